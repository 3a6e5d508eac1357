"""Stateless tensor functions: each operation as a plain-torch reference and as compiled kernels.

A privacy unit is a segment of rows. ``offsets`` int64 [U + 1] says which: unit u owns rows
``offsets[u]:offsets[u + 1]``; None means that every row is a unit of its own.
"""

from synthward.kernels._allocation import reuse_freed_blocks as reuse_freed_blocks
from synthward.kernels._chacha import chacha20_words as chacha20_words
from synthward.kernels._select import Backend as Backend
from synthward.kernels._select import available_isas as available_isas
from synthward.kernels._select import cpu_isa as cpu_isa
from synthward.kernels._select import force_isa as force_isa
from synthward.kernels._select import is_shape as is_shape
from synthward.kernels._select import leave_resizable as leave_resizable
from synthward.kernels._select import uses_triton as uses_triton
from synthward.kernels.conv import ConvShape as ConvShape
from synthward.kernels.conv import conv_norms as conv_norms
from synthward.kernels.conv import conv_sum as conv_sum
from synthward.kernels.conv import conv_unit_grads as conv_unit_grads
from synthward.kernels.decode import ResidualWeights as ResidualWeights
from synthward.kernels.decode import draw_tokens as draw_tokens
from synthward.kernels.decode import residual_features as residual_features
from synthward.kernels.diagonal import diagonal_sq_norms as diagonal_sq_norms
from synthward.kernels.diagonal import diagonal_weighted_sum as diagonal_weighted_sum
from synthward.kernels.discrete import discrete_release_ as discrete_release_
from synthward.kernels.discrete import rounded_gaussian as rounded_gaussian
from synthward.kernels.noise import add_gaussian_noise_ as add_gaussian_noise_
from synthward.kernels.noise import gaussian_noise as gaussian_noise
from synthward.kernels.noise.correlation import Correlation as Correlation
from synthward.kernels.normalize import group_norm_backward as group_norm_backward
from synthward.kernels.normalize import layer_norm_backward as layer_norm_backward
from synthward.kernels.outer import outer_sq_norms as outer_sq_norms
from synthward.kernels.outer import outer_weighted_sum as outer_weighted_sum
from synthward.kernels.outer import scale_rows as scale_rows
from synthward.kernels.outer.dense import SUM_BLOCK as SUM_BLOCK
from synthward.kernels.outer.dense import outer_norms as outer_norms
from synthward.kernels.outer.dense import outer_sum as outer_sum
from synthward.kernels.outer.dense import outer_unit_grads as outer_unit_grads
from synthward.kernels.outer.dense import rank1_norms as rank1_norms
from synthward.kernels.outer.dense import sum_chain as sum_chain
from synthward.kernels.product import product as product
from synthward.kernels.scatter import scatter_sq_norms as scatter_sq_norms
from synthward.kernels.scatter import scatter_weighted_sum as scatter_weighted_sum
from synthward.kernels.update import noisy_adam_ as noisy_adam_
from synthward.kernels.update import noisy_sgd_ as noisy_sgd_

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
from synthward.kernels._select import place_of as place_of
from synthward.kernels._select import planned_device as planned_device
from synthward.kernels._select import uses_triton as uses_triton
from synthward.kernels._tracing import is_tracing as is_tracing
from synthward.kernels._tracing import traceable as _traceable
from synthward.kernels.conv import ConvShape as ConvShape
from synthward.kernels.conv import conv_norms as _conv_norms
from synthward.kernels.conv import conv_sum as _conv_sum
from synthward.kernels.conv import conv_unit_grads as _conv_unit_grads
from synthward.kernels.decode import ResidualWeights as ResidualWeights
from synthward.kernels.decode import draw_tokens as draw_tokens
from synthward.kernels.decode import linear_rows as linear_rows
from synthward.kernels.decode import residual_features as residual_features
from synthward.kernels.diagonal import diagonal_sq_norms as _diagonal_sq_norms
from synthward.kernels.diagonal import diagonal_weighted_sum as _diagonal_weighted_sum
from synthward.kernels.discrete import discrete_release_ as discrete_release_
from synthward.kernels.discrete import rounded_gaussian as rounded_gaussian
from synthward.kernels.noise import add_gaussian_noise_ as add_gaussian_noise_
from synthward.kernels.noise import gaussian_noise as gaussian_noise
from synthward.kernels.noise import uniform_noise as uniform_noise
from synthward.kernels.noise.correlation import Correlation as Correlation
from synthward.kernels.normalize import group_norm_backward as _group_norm_backward
from synthward.kernels.normalize import layer_norm_backward as _layer_norm_backward
from synthward.kernels.outer import outer_sq_norms as _outer_sq_norms
from synthward.kernels.outer import outer_weighted_sum as _outer_weighted_sum
from synthward.kernels.outer import scale_rows as _scale_rows
from synthward.kernels.outer.dense import EXACT_TERMS as EXACT_TERMS
from synthward.kernels.outer.dense import SUM_BLOCK as SUM_BLOCK
from synthward.kernels.outer.dense import outer_norms as _outer_norms
from synthward.kernels.outer.dense import outer_sum as _outer_sum
from synthward.kernels.outer.dense import outer_unit_grads as _outer_unit_grads
from synthward.kernels.outer.dense import rank1_norms as _rank1_norms
from synthward.kernels.outer.dense import rounding_of as rounding_of
from synthward.kernels.outer.dense import sum_chain as sum_chain
from synthward.kernels.product import product as _product
from synthward.kernels.scatter import scatter_sq_norms as _scatter_sq_norms
from synthward.kernels.scatter import scatter_weighted_sum as _scatter_weighted_sum
from synthward.kernels.update import noisy_adam_ as noisy_adam_
from synthward.kernels.update import noisy_sgd_ as noisy_sgd_

# What a step's forward and backward pass are made of; noise and updates are never part of a trace.
conv_norms = _traceable(_conv_norms)
conv_sum = _traceable(_conv_sum)
conv_unit_grads = _traceable(_conv_unit_grads)
diagonal_sq_norms = _traceable(_diagonal_sq_norms)
diagonal_weighted_sum = _traceable(_diagonal_weighted_sum)
group_norm_backward = _traceable(_group_norm_backward)
layer_norm_backward = _traceable(_layer_norm_backward)
outer_norms = _traceable(_outer_norms)
outer_sq_norms = _traceable(_outer_sq_norms)
outer_sum = _traceable(_outer_sum)
outer_unit_grads = _traceable(_outer_unit_grads)
outer_weighted_sum = _traceable(_outer_weighted_sum)
product = _traceable(_product)
rank1_norms = _traceable(_rank1_norms)
scale_rows = _traceable(_scale_rows)
scatter_sq_norms = _traceable(_scatter_sq_norms)
scatter_weighted_sum = _traceable(_scatter_weighted_sum)

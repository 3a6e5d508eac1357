"""Watching a run: a structured log and TensorBoard scalars, of noised and public quantities alone."""

from synthward.observe.epsilon import EpsilonSoFar as EpsilonSoFar
from synthward.observe.log import LOG_FILE as LOG_FILE
from synthward.observe.log import NullLog as NullLog
from synthward.observe.log import RunLog as RunLog
from synthward.observe.scalars import check_tensorboard as check_tensorboard
from synthward.observe.training import Observer as Observer
from synthward.observe.training import TrainingObserver as TrainingObserver

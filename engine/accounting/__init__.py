"""Privacy accounting over the dp-accounting library; never imports torch."""

from synthward.engine.accounting.accountant import ACCOUNTANTS as ACCOUNTANTS
from synthward.engine.accounting.accountant import Accountant as Accountant
from synthward.engine.accounting.accountant import epsilon_curve as epsilon_curve
from synthward.engine.accounting.accountant import epsilon_of as epsilon_of
from synthward.engine.accounting.calibrate import calibrate_noise as calibrate_noise
from synthward.engine.accounting.calibrate import calibrate_sample_rate as calibrate_sample_rate
from synthward.engine.accounting.calibrate import calibrate_steps as calibrate_steps
from synthward.engine.accounting.events import ApproximateEvent as ApproximateEvent
from synthward.engine.accounting.events import CorrelatedGaussianEvent as CorrelatedGaussianEvent
from synthward.engine.accounting.events import CyclicPoissonGaussianEvent as CyclicPoissonGaussianEvent
from synthward.engine.accounting.events import Event as Event
from synthward.engine.accounting.events import FixedSizeGaussianEvent as FixedSizeGaussianEvent
from synthward.engine.accounting.events import GaussianEvent as GaussianEvent
from synthward.engine.accounting.events import LaplaceEvent as LaplaceEvent
from synthward.engine.accounting.events import PoissonGaussianEvent as PoissonGaussianEvent
from synthward.engine.accounting.events import SelectionEvent as SelectionEvent
from synthward.engine.accounting.events import StepsEvent as StepsEvent
from synthward.engine.accounting.events import TruncatedPoissonGaussianEvent as TruncatedPoissonGaussianEvent
from synthward.engine.accounting.events import event_from_dict as event_from_dict
from synthward.engine.accounting.filter import RdpFilter as RdpFilter

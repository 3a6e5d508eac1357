"""What a private step will need, told before anything is allocated: memory, operations, time.

A step is rehearsed on tensors that have shapes and no numbers (torch's FakeTensorMode), by the engine's own capture,
planner and sums, while every allocation is metered. So what is told is what the engine does, not a second account
of it.
"""

from synthward.engine.estimate.cost import Estimate as Estimate
from synthward.engine.estimate.cost import Memory as Memory
from synthward.engine.estimate.cost import Method as Method
from synthward.engine.estimate.cost import Step as Step
from synthward.engine.estimate.planning import estimate as estimate
from synthward.engine.estimate.rehearsal import Rehearsal as Rehearsal
from synthward.engine.estimate.rehearsal import rehearse as rehearse
from synthward.engine.estimate.setting import Built as Built
from synthward.engine.estimate.setting import Device as Device
from synthward.engine.estimate.setting import Setting as Setting
from synthward.engine.estimate.setting import Workload as Workload

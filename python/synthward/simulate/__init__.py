"""An invented hospital with known ground truth. Nothing here is evidence about any real population."""

from synthward.simulate.patients import comorbidity_probability as comorbidity_probability
from synthward.simulate.truth import COMORBIDITIES as COMORBIDITIES
from synthward.simulate.truth import DIAGRAM as DIAGRAM
from synthward.simulate.truth import OUTCOME as OUTCOME
from synthward.simulate.truth import outcome_probability as outcome_probability
from synthward.simulate.write import SIMULATION_SCHEMA_TOML as SIMULATION_SCHEMA_TOML
from synthward.simulate.write import simulate_batches as simulate_batches
from synthward.simulate.write import simulation_schema as simulation_schema
from synthward.simulate.write import write_simulation as write_simulation

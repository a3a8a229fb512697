"""Plans: what a block did, as data that is saved, looked at, and applied to a model here or elsewhere."""

from nnatomy.plans.control_vector import from_control_vector as from_control_vector
from nnatomy.plans.expected import Check as Check
from nnatomy.plans.files import load_plan as load_plan
from nnatomy.plans.plan import Plan as Plan
from nnatomy.plans.pyvene import from_pyvene as from_pyvene

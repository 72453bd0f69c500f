"""Every method, one file each."""

from diffdistill.method import Method
from diffdistill.methods.consistency import Consistency, ConsistencyTraining
from diffdistill.methods.degrade import Degrade
from diffdistill.methods.denoise import Denoise
from diffdistill.methods.diff_instruct import DiffInstruct
from diffdistill.methods.disback import DisBack
from diffdistill.methods.dmd import DMD
from diffdistill.methods.dmd2 import DMD2
from diffdistill.methods.f_distill import FDistill
from diffdistill.methods.ladd import LADD
from diffdistill.methods.mean_flow import MeanFlow, MeanFlowTraining
from diffdistill.methods.multi_student import MultiStudent
from diffdistill.methods.phased_dmd import PhasedDMD
from diffdistill.methods.rcm import RCM
from diffdistill.methods.reflow import Reflow
from diffdistill.methods.reflow_distill import ReflowDistill
from diffdistill.methods.scm import SCM
from diffdistill.methods.score_matching import ScoreMatching
from diffdistill.methods.sct import SCT
from diffdistill.methods.shortcut import Shortcut
from diffdistill.methods.sid import SiD
from diffdistill.methods.sim import SIM
from diffdistill.methods.uni_instruct import UniInstruct

METHODS: dict[str, type[Method]] = {
    "consistency": Consistency,
    "consistency_training": ConsistencyTraining,
    "degrade": Degrade,
    "denoise": Denoise,
    "diff_instruct": DiffInstruct,
    "disback": DisBack,
    "dmd": DMD,
    "dmd2": DMD2,
    "f_distill": FDistill,
    "ladd": LADD,
    "mean_flow": MeanFlow,
    "mean_flow_training": MeanFlowTraining,
    "multi_student": MultiStudent,
    "phased_dmd": PhasedDMD,
    "rcm": RCM,
    "reflow": Reflow,
    "reflow_distill": ReflowDistill,
    "scm": SCM,
    "score_matching": ScoreMatching,
    "sct": SCT,
    "shortcut": Shortcut,
    "sid": SiD,
    "sim": SIM,
    "uni_instruct": UniInstruct,
}

"""The distillers by name. To add one: a file beside these, and a line here."""

from .at import AT
from .cc import CC
from .ce import CE
from .crd import CRD
from .dist import DIST
from .dkd import DKD
from .dpk import DPK
from .fitnet import FitNet
from .ickd import ICKD
from .kd import KD
from .mlkd import MLKD
from .nst import NST
from .ofd import OFD
from .pkt import PKT
from .reviewkd import ReviewKD
from .rkd import RKD
from .sp import SP
from .vid import VID

DISTILLERS = {
    "ce": CE,
    "kd": KD,
    "fitnet": FitNet,
    "at": AT,
    "sp": SP,
    "pkt": PKT,
    "rkd": RKD,
    "vid": VID,
    "cc": CC,
    "nst": NST,
    "ofd": OFD,
    "crd": CRD,
    "reviewkd": ReviewKD,
    "ickd": ICKD,
    "dkd": DKD,
    "dist": DIST,
    "mlkd": MLKD,
    "dpk": DPK,
}

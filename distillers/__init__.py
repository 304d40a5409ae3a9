"""The distillers by name. To add one: a file beside these, and a line here."""

from .ce import CE
from .dpk import DPK
from .fitnet import FitNet
from .ickd import ICKD
from .kd import KD

DISTILLERS = {
    "ce": CE,
    "kd": KD,
    "fitnet": FitNet,
    "ickd": ICKD,
    "dpk": DPK,
}

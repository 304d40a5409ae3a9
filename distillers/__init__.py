"""The distillers by name. To add one: a file beside these, and a line here."""

import inspect

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

NO_SETTINGS = ["image_size", "num_samples", "masked"]  # arguments of distillers that the scripts give


def with_defaults(distiller):
    """The settings `distiller`, {"name": …, arguments}, and the defaults of the arguments that they leave out.

    As they are for a name that is not known. Tuples become lists, as they do in a YAML file.
    """
    name = distiller.get("name")
    if not isinstance(name, str) or name not in DISTILLERS:
        return distiller
    arguments = inspect.signature(DISTILLERS[name]).parameters.values()
    defaults = {argument.name: argument.default for argument in arguments
                if argument.kind is argument.KEYWORD_ONLY and argument.name not in NO_SETTINGS}
    settings = {"name": name} | defaults | distiller
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

"""Launch numbers from a file, as `python -m bench tune` writes it: `XENT_EXT_TUNING`."""

import json
from dataclasses import dataclass, replace

from .plan import CHOICES


@dataclass(frozen=True)
class TuningFile:
    """Some or all fields of a `Tuning` (see xent_ext/plan.py), for the device that they were found on.

        {"device": "NVIDIA H100 80GB HBM3", "tuning": {"source": "measured on ...", "packed_tile": 1024, ...}}

    Whatever else is in the file says how they were found. Fields that are left out are as shipped.
    """

    path: str
    device: str
    tuning: dict

    @classmethod
    def read(cls, path):
        """ValueError for what is no such file, with what was expected."""
        try:
            with open(path, encoding="utf-8") as file:
                content = json.load(file)
            device, tuning = content["device"], content["tuning"]
            if not (isinstance(device, str) and isinstance(tuning, dict)):
                raise TypeError("their types are others")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'XENT_EXT_TUNING={path} must be JSON with "device", a name, and "tuning", an object: {error!r}'
            ) from None
        numbers = {name: number(path, name, value) for name, value in tuning.items()}
        return cls(path, device, {"source": f"from {path}"} | numbers)

    def override(self, shipped, device):
        """The tuning for the device of that name; ValueError where the file is for another."""
        if device != self.device:
            raise ValueError(f"XENT_EXT_TUNING={self.path} is for {self.device!r}, but the logits are on {device!r}")
        return replace(shipped, **self.tuning)


def number(path, name, value):
    """The choice that a field of the file stands for."""
    if name == "source":
        if not isinstance(value, str):
            raise ValueError(f"XENT_EXT_TUNING={path}: source must be a string, got {value!r}")
        return value
    if name not in CHOICES:
        raise ValueError(f"XENT_EXT_TUNING={path}: no choice is called {name!r}, but {', '.join(CHOICES)} are")
    choices = {json.dumps(choice): choice for choice in CHOICES[name]}
    if (found := json.dumps(value)) not in choices:
        raise ValueError(f"XENT_EXT_TUNING={path}: {name} must be one of {', '.join(choices)}, got {found}")
    return choices[found]

"""The architectures that we share with Hugging Face's library, by `model_type`: those of the files of `families/`."""

import importlib
import pkgutil

from models.import_hf import families
from models.import_hf.architecture import Architecture

ARCHITECTURES: dict[str, Architecture] = {
    module.name: importlib.import_module(f"{families.__name__}.{module.name}").ARCHITECTURE
    for module in pkgutil.iter_modules(families.__path__)
}

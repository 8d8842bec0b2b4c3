"""For ``torch.hub``: every model of ``normfree.list_models()`` by name, freshly initialised.

>>> torch.hub.load("OWNER/normfree", "nf_resnet50", num_classes=10)  # doctest: +SKIP

OWNER/normfree is the repository on GitHub; with ``source="local"``, a checkout's folder.
"""

import sys
from functools import partial as _partial
from functools import update_wrapper as _update_wrapper
from pathlib import Path as _Path

# What torch.hub asks for before it calls an entry.
dependencies = ["torch", "numpy", "safetensors"]

# torch.hub has the repository, which need not be installed.
_source = str(_Path(__file__).parent / "src")
sys.path.insert(0, _source)

from normfree import create_model as _create_model  # noqa: E402
from normfree import list_models as _list_models  # noqa: E402

sys.path.remove(_source)  # by value: an import may have put something before it

for _name in _list_models():
    globals()[_name] = _update_wrapper(_partial(_create_model, _name), _create_model)

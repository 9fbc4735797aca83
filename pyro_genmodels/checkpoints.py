"""What training leaves on disk: tensors as safetensors, the record as JSON, each whole or not at all."""

from __future__ import annotations

__all__ = ["save"]

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def save(path: Path, state: dict[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes ``path.safetensors`` and ``path.json``, under another name first and then renamed.

    Args:
        path: without suffix; its folder is made.
        state: tensors by name.
        record: what JSON can say of them.

    Raises:
        ImportError: without safetensors.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("A checkpoint needs safetensors: pip install 'pyro-genmodels[cli]'.") from error
    path = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    for suffix, write in (
        (".safetensors", lambda part: save_file(state, part)),
        (".json", lambda part: part.write_text(text)),
    ):
        target = path.with_name(path.name + suffix)
        part = target.with_name(target.name + ".part")
        write(part)
        os.replace(part, target)

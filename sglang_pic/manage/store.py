"""Save compiled segments to a directory, and start warm from it.

The directory is the operator's (``--pic-store``), never a client's choice.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Collection
from typing import Any

from sglang_pic import __version__
from sglang_pic.errors import PicRefused
from sglang_pic.forest import files
from sglang_pic.forest.files import BadFile
from sglang_pic.forest.forest import Forest
from sglang_pic.forest.keys import segment_id
from sglang_pic.link.policy import floor_to

logger = logging.getLogger(__name__)


def _architecture(config: Any) -> str:
    """The model's configuration, wherever it lies."""
    fields = config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        fields.pop(name, None)
    return json.dumps(fields, sort_keys=True, default=str)


class Store:
    """Saved segments of one server, which runs on one tensor-parallel rank.

    Args:
        forest: whose segments.
        runner: SGLang's model runner.
        directory: the operator's.
    """

    def __init__(self, forest: Forest, runner: Any, directory: pathlib.Path):
        self._forest = forest
        self._pool = runner.token_to_kv_pool
        self._runner = runner
        self._layers = sorted(runner.attn_backend.ropes)
        self._directory = directory

    def _marks(self) -> dict[str, str]:
        """The fingerprint, of the weights that are loaded now."""
        forest, first = self._forest, self._pool.get_key_buffer(self._layers[0])
        return files.fingerprint(
            sglang_pic=__version__,
            weights=files.digest_of_weights(self._runner.model),
            architecture=_architecture(self._runner.model_config.hf_config),
            kv_dtype=first.dtype,
            kv_heads_and_dimension=tuple(first.shape[1:]),
            attention_layers=self._layers,
            page_size=forest.pages.page_size,
            compile_context=list(forest.segments.context),
            linear_layers=getattr(self._runner.attn_backend, "shape", None),
            state_dtype=forest.config.state_dtype,
            operator_threshold=forest.config.operator_threshold,
        )

    def save(self, tenant: str | None, chosen: Collection[str] | None) -> dict[str, Any]:
        """Write segments of a tenant, all or those chosen by id; not those of an
        adapter, whose weights the fingerprint does not know.

        Raises:
            PicRefused: 404 for an id that is not held; 507 where the disk refuses.
        """
        forest = self._forest
        records = forest.segments.records(tenant)
        if chosen is not None:
            held = {record.id: record for record in records}
            if any(name not in held for name in chosen):
                raise PicRefused(404, "no such segment", "ids")
            records = [held[name] for name in dict.fromkeys(chosen)]
        records = [record for record in records if not record.extra_key]
        written, marks = 0, self._marks()
        try:
            for record in records:
                slots = forest.holder.slots(record)
                tensors = forest.carried.tensors(record.id)
                for layer in self._layers:
                    tensors[f"k.{layer}"] = self._pool.get_key_buffer(layer)[slots]
                    tensors[f"v.{layer}"] = self._pool.get_value_buffer(layer)[slots]
                saved = files.SavedSegment(
                    record.path, record.extra_key, record.salt, record.hits, tensors,
                    forest.carried.core_end(record.id, record.owner),
                )  # fmt: skip
                file = files.write(self._directory, record.id, saved, marks)
                written += file.stat().st_size
        except OSError as error:
            raise PicRefused(507, f"cannot write {self._directory}: {error}", "ids") from error
        return {"segments": len(records), "bytes": written}

    def restore(self, tenant: str | None = None, *, everyone: bool = False) -> dict[str, Any]:
        """Load what was saved, of one tenant or of everyone, as far as it fits.

        Returns:
            ``{"segments": loaded, "present": held already, "refused": [{"file",
            "reason"}]}``; nothing of a refused file is loaded.
        """
        forest = self._forest
        loaded = present = 0
        refused = []
        found = files.listed(self._directory)
        marks = self._marks() if found else {}
        for file in found:
            try:
                saved = files.read(file, marks)
                if not everyone and saved.salt != forest.segments.namespace(tenant):
                    continue
                name = segment_id(
                    saved.salt, saved.extra_key, saved.path[len(forest.segments.context) :]
                )
                if file.stem != name:
                    raise BadFile("its name is not that of the segment it holds")
                if forest.segments.is_held(name):
                    present += 1
                    continue
                self._load(saved)
                loaded += 1
            except BadFile as error:
                logger.warning("sglang_pic: %s is not restored: %s", file.name, error)
                refused.append({"file": file.name, "reason": str(error)})
        return {"segments": loaded, "present": present, "refused": refused}

    def _load(self, saved: files.SavedSegment) -> None:
        held = floor_to(len(saved.path), self._forest.pages.page_size)
        for layer in self._layers:
            for name, buffer in (
                (f"k.{layer}", self._pool.get_key_buffer(layer)),
                (f"v.{layer}", self._pool.get_value_buffer(layer)),
            ):
                if name not in saved.tensors or saved.tensors[name].shape != (
                    held,
                    *buffer.shape[1:],
                ):
                    raise BadFile(f"{name} is not what its tokens need")
        empty = self._forest.holder.adopt(saved, held)
        if empty is None:
            raise BadFile("it does not fit into what is free of the budgets")
        tokens, slots = empty
        for layer in self._layers:
            keys, values = self._pool.get_key_buffer(layer), self._pool.get_value_buffer(layer)
            keys[slots] = saved.tensors[f"k.{layer}"][tokens.cpu()].to(keys.device)
            values[slots] = saved.tensors[f"v.{layer}"][tokens.cpu()].to(values.device)

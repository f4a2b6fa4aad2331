"""Save compiled segments to a directory, and start warm from it.

The directory is the operator's (``--pic-store``), never a client's choice. Of several
tensor-parallel ranks each keeps its part in a folder of its own there; a segment is
loaded by all of them or by none.
"""

from __future__ import annotations

import json
import logging
import pathlib
from collections.abc import Collection
from typing import Any

from sglang_pic import __version__
from sglang_pic.attention.latent import stored
from sglang_pic.errors import PicRefused
from sglang_pic.forest import files
from sglang_pic.forest.consensus import ALONE, Group
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
    """Saved segments of one server.

    Args:
        forest: whose segments.
        runner: SGLang's model runner.
        directory: the operator's.
        ranks: of tensor parallelism.
    """

    def __init__(self, forest: Forest, runner: Any, directory: pathlib.Path, ranks: Group = ALONE):
        self._ranks = ranks
        self._forest = forest
        self._pool = runner.token_to_kv_pool
        self._runner = runner
        self._layers = sorted(runner.attn_backend.ropes)
        several = ranks.size > 1
        self._directory = directory / f"rank{ranks.rank}of{ranks.size}" if several else directory

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
                    keys, values = stored(self._pool, layer)
                    tensors[f"k.{layer}"] = keys[slots]
                    tensors[f"v.{layer}"] = values[slots]
                saved = files.SavedSegment(
                    record.path, record.extra_key, record.salt, record.hits, tensors,
                    forest.carried.core_end(record.id, record.owner),
                )  # fmt: skip
                file = files.write(self._directory, record.id, saved, marks)
                written += file.stat().st_size
            failed = None
        except OSError as error:
            failed = f"cannot write {self._directory}: {error}"
        told = self._ranks.gather((failed, written))
        problems = [problem for problem, _ in told if problem is not None]
        if problems:
            raise PicRefused(507, problems[0], "ids")
        return {"segments": len(records), "bytes": sum(size for _, size in told)}

    def restore(self, tenant: str | None = None, *, everyone: bool = False) -> dict[str, Any]:
        """Load what was saved, of one tenant or of everyone, as far as it fits.

        Returns:
            ``{"segments": loaded, "present": held already, "refused": [{"file",
            "reason"}]}``; nothing of a refused file is loaded.
        """
        forest = self._forest
        loaded = present = 0
        refused = []
        listed = self._ranks.gather([file.name for file in files.listed(self._directory)])
        marks = self._marks() if any(listed) else {}
        for name in sorted({name for names in listed for name in names}):
            saved, problem = self._read(self._directory / name, marks)
            problems = [one for one in self._ranks.gather(problem) if one is not None]
            if not problems and saved is not None:
                if not everyone and saved.salt != forest.segments.namespace(tenant):
                    continue
                if forest.segments.is_held(name.removesuffix(files.SUFFIX)):
                    present += 1
                    continue
                if self._load(saved):
                    loaded += 1
                    continue
                problems = ["it does not fit into what is free of the budgets"]
            logger.warning("sglang_pic: %s is not restored: %s", name, problems[0])
            refused.append({"file": name, "reason": problems[0]})
        return {"segments": loaded, "present": present, "refused": refused}

    def _read(
        self, file: pathlib.Path, marks: dict[str, str]
    ) -> tuple[files.SavedSegment | None, str | None]:
        """What a file holds, or why it cannot be loaded."""
        try:
            saved = files.read(file, marks)
            context = len(self._forest.segments.context)
            if file.stem != segment_id(saved.salt, saved.extra_key, saved.path[context:]):
                raise BadFile("its name is not that of the segment it holds")
            self._check(saved)
        except BadFile as error:
            return None, str(error)
        except Exception as error:
            # The other ranks wait for what this one says.
            return None, f"it could not be read: {error!r}"
        return saved, None

    def _check(self, saved: files.SavedSegment) -> None:
        held = floor_to(len(saved.path), self._forest.pages.page_size)
        for layer in self._layers:
            keys, values = stored(self._pool, layer)
            for name, buffer in ((f"k.{layer}", keys), (f"v.{layer}", values)):
                if name not in saved.tensors or saved.tensors[name].shape != (
                    held,
                    *buffer.shape[1:],
                ):
                    raise BadFile(f"{name} is not what its tokens need")

    def _load(self, saved: files.SavedSegment) -> bool:
        """Whether it fits: on all ranks alike."""
        held = floor_to(len(saved.path), self._forest.pages.page_size)
        empty = self._forest.holder.adopt(saved, held)
        if empty is None:
            return False
        tokens, slots = empty
        for layer in self._layers:
            keys, values = stored(self._pool, layer)
            keys[slots] = saved.tensors[f"k.{layer}"][tokens.cpu()].to(keys.device)
            values[slots] = saved.tensors[f"v.{layer}"][tokens.cpu()].to(values.device)
        return True

"""training.json: what was trained, on what, how far and how fast. Evaluation figures come from `evaluate`."""

from __future__ import annotations

import json
import platform
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from foregate.reference.corpus import Manifest
from foregate.reference.export import to_checkpoint
from foregate.reference.model import ModelConfig, shapes
from foregate.reference.train import Trainer

CURVE_POINTS = 40


def parameters(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those active for one token."""
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes(config).items()}
    experts = sum(size for name, size in sizes.items() if name.rsplit(".", 1)[-1] in ("gate_up", "down"))
    total = sum(sizes.values())
    return total, total - experts + experts * config.experts_per_token // config.experts


def training_figures(trainer: Trainer, manifest: Manifest, folder: Path, curve: Path) -> dict[str, Any]:
    """Everything but the evaluation, as JSON values."""
    total, active = parameters(trainer.model)
    weights = folder / "model.safetensors"
    return {
        "format": 1,
        "model": asdict(trainer.model)
        | {
            "parameters": total,
            "active_parameters": active,
            "tensors": len(to_checkpoint(trainer.model, trainer.optimizer.named)),
            "file_bytes": weights.stat().st_size,
            "dtype": "bfloat16",
        },
        "corpus": _corpus(trainer, manifest),
        "training": _training(trainer, curve),
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads()},
    }


def _corpus(trainer: Trainer, manifest: Manifest) -> dict[str, Any]:
    sources = {domain.name: domain.sources for domain in manifest.domains}
    seen = trainer.batches.epochs(trainer.step)
    return {
        "digest": trainer.corpus.digest,
        "held_out_share_of_documents": manifest.held_out_share,
        "domains": {
            domain.name: {
                "share": domain.share,
                "documents": domain.documents,
                "tokens": len(domain.train),
                "epochs": round(seen[domain.name], 3),
                "held_out_documents": domain.held_out_documents,
                "held_out_tokens": len(domain.held_out),
                "sources": [
                    {"title": source.title or source.dataset, "licence": source.licence, "origin": source.origin}
                    for source in sources.get(domain.name, ())
                ],
            }
            for domain in trainer.corpus.domains
        },
    }


def _training(trainer: Trainer, curve: Path) -> dict[str, Any]:
    points = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    rates = [point["tokens_per_second"] for point in points]
    return {
        "tokens": trainer.tokens_seen,
        "steps": trainer.step,
        "finished": trainer.step >= trainer.config.steps,
        "compiled": trainer.compiled,
        "seconds_in_steps": round(trainer.seconds, 1),
        "tokens_per_second_median": round(statistics.median(rates)) if rates else None,
        "tokens_per_second_best": round(max(rates)) if rates else None,
        "dropped_assignments_last": points[-1]["dropped"] if points else None,
        "config": asdict(trainer.config),
        "changes_on_resume": trainer.changes,
        "loss_curve": [[point["tokens"], round(point["loss"], 4)] for point in _thinned(points)],
    }


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = max(1, -(-len(points) // CURVE_POINTS))
    return points[step - 1 :: step] if points else []


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

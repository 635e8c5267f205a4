"""The model card (README.md of the exported folder), written from training.json and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from foregate.reference.files import write_text

INTRODUCTION = """\
A small Mixture-of-Experts language model, really trained, that ships with Foregate. It exists so that routing can be
traced, predicted and prefetched on any machine: its routers have learned, while those of a randomly initialised model
have not. It is not meant to be useful as a language model: it writes the form of its three domains and must not be
relied on for facts, arithmetic or working code."""

LICENCE_NOTE = """\
The weights are distributed under Apache-2.0, like Foregate. No training text is contained in the package; the texts
and their licences are listed below. The texts that Foregate evaluates on elsewhere (GSM8K test, MMLU) were not used."""


def write_card(folder: Path, figures: dict[str, Any]) -> None:
    """Write README.md into an exported model's folder."""
    write_text(folder / "README.md", render_card(figures))


def render_card(figures: dict[str, Any]) -> str:
    """The card's text. `figures` is training.json with its evaluation."""
    return (
        "\n\n".join(
            (
                _front_matter(figures),
                "# Foregate reference model",
                INTRODUCTION,
                "## Model\n\n" + _model(figures["model"]),
                "## Use\n\n" + USE,
                "## Training\n\n" + _training(figures),
                "## Data and licences\n\n" + LICENCE_NOTE + "\n\n" + _sources(figures["corpus"]["domains"]),
                "## Held-out loss\n\n" + _held_out(figures["evaluation"]),
                "## Expert load\n\n" + _load(figures["evaluation"]),
                "## Samples\n\n" + _samples(figures["evaluation"]["samples"]),
                "## Loss curve\n\n" + _table(("training tokens", "loss"), figures["training"]["loss_curve"]),
            )
        )
        + "\n"
    )


USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

The tokenizer is a byte-level BPE of the model's own; digits are single tokens. `<|endoftext|>` ends each document and
also serves as beginning of sequence; it is not added to prompts."""


def _front_matter(figures: dict[str, Any]) -> str:
    names = "".join(f"- {name}\n" for name in figures["corpus"]["domains"])
    return (
        "---\nlicense: apache-2.0\nlanguage:\n- en\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        f"tags:\n- mixture-of-experts\n- qwen3_moe\n- foregate\n{names}---"
    )


def _model(model: dict[str, Any]) -> str:
    rows = [
        ("architecture", "Qwen3-MoE (`Qwen3MoeForCausalLM`)"),
        ("parameters", f"{model['parameters']:,} ({model['active_parameters']:,} active per token)"),
        ("layers, all of them MoE", model["layers"]),
        ("hidden size", model["hidden_size"]),
        ("experts", f"{model['experts']} per layer, top-{model['experts_per_token']}, normalised weights"),
        ("expert hidden size", model["expert_hidden"]),
        ("attention", f"{model['heads']} heads of {model['head_dim']}, {model['kv_heads']} key/value heads"),
        ("vocabulary", f"{model['vocab_size']}, embeddings tied"),
        ("positions", f"{model['max_positions']} declared; see the training length below"),
        ("weights", f"{model['dtype']}, {model['tensors']} tensors, {model['file_bytes']:,} bytes"),
    ]
    return _table(("", ""), rows)


def _training(figures: dict[str, Any]) -> str:
    run, config, machine = figures["training"], figures["training"]["config"], figures["machine"]
    state = "schedule finished, decay included" if run["finished"] else "intermediate export, not decayed"

    def history(key: str) -> str:
        past = [change for change in run["changes_on_resume"] if key in change]
        return "".join(f"{c[key][0]:g} until step {c['step']}, then " for c in past) + f"{config[key]:g}"

    rows = [
        ("tokens", f"{run['tokens']:,} ({state})"),
        ("steps", f"{run['steps']} of {config['rows']} sequences of {config['length']} tokens"),
        (
            "optimizer",
            f"AdamW ({config['beta1']}, {config['beta2']}), weight decay {config['weight_decay']}, clipped at "
            f"{config['clip']}; bf16 parameters with fp32 master copies",
        ),
        (
            "learning rate",
            f"{config['learning_rate']:g}: {config['warmup_steps']} steps of warm-up, constant, linear decay over the "
            f"last {config['decay_share']:.0%}",
        ),
        (
            "router losses",
            f"balance {history('balance_coefficient')} and z {config['z_coefficient']:g}, each summed over layers",
        ),
        (
            "expert capacity",
            f"{history('capacity_factor')} x uniform in training ({run['dropped_assignments_last']:.2%} of choices "
            "dropped at the end), unlimited in use",
        ),
        (
            "speed",
            f"{run['tokens_per_second_median']:,} tokens/s median, {run['tokens_per_second_best']:,} best; the "
            f"machine was shared ({machine['threads']} threads of {machine['cpu']})",
        ),
        ("time in steps", f"{run['seconds_in_steps'] / 60:.0f} minutes"),
        ("seed", config["seed"]),
        ("software", ", ".join(f"{name} {version}" for name, version in figures["software"].items())),
    ]
    return _table(("", ""), rows)


def _sources(domains: dict[str, Any]) -> str:
    head = ("domain", "share", "training tokens", "epochs", "held-out documents", "held-out tokens")
    totals = [
        (
            name,
            f"{d['share']:.0%}",
            f"{d['tokens']:,}",
            f"{d['epochs']:.2f}",
            d["held_out_documents"],
            f"{d['held_out_tokens']:,}",
        )
        for name, d in domains.items()
    ]
    rows = [
        (name, source["title"], source["licence"], source["origin"])
        for name, d in domains.items()
        for source in d["sources"]
    ]
    return f"{_table(head, totals)}\n\n{_table(('domain', 'source', 'licence', 'origin'), rows)}"


def _held_out(evaluation: dict[str, Any]) -> str:
    rows = [
        (name, f"{d['tokens']:,}", f"{d['loss']:.3f}", f"{d['perplexity']:.2f}", f"{d['bits_per_byte']:.3f}")
        for name, d in evaluation["domains"].items()
    ]
    note = (
        f"Measured with transformers on the exported weights, blocks of {evaluation['length']} tokens of documents "
        "that were never trained on\n(split by a hash of the document's name), no choice dropped."
    )
    return f"{note}\n\n{_table(('domain', 'tokens', 'loss (nats)', 'perplexity', 'bits per byte'), rows)}"


def _load(evaluation: dict[str, Any]) -> str:
    dead = evaluation["dead_experts"]
    listed = ", ".join(f"layer {index} expert {expert}" for index, expert in dead)
    note = (
        "Share of a layer's choices on the held-out tokens, all domains weighted alike; 1 is uniform. Entropy is "
        f"normalised; its mean is {evaluation['mean_entropy']:.3f} over all domains together and "
        + ", ".join(f"{value:.3f} on {name}" for name, value in evaluation["domain_entropy"].items())
        + f" alone. Dead experts (below {evaluation['dead_below_share_of_uniform']} of uniform): "
        + (f"{len(dead)} ({listed})." if dead else "none.")
    )
    rows = [
        (index, f"{row['lowest']:.2f}", f"{row['highest']:.2f}", f"{row['entropy']:.3f}")
        for index, row in enumerate(evaluation["layers"])
    ]
    return f"{note}\n\n{_table(('layer', 'lowest', 'highest', 'entropy'), rows)}"


def _samples(samples: dict[str, dict[str, str]]) -> str:
    return "\n\n".join(
        f"**{name}** (greedy; the prompt ends at ⟦)\n\n```text\n{s['prompt']}⟦{s['continuation']}\n```"
        for name, s in samples.items()
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    titles = list(head)
    lines = [titles, ["---"] * len(titles), *([str(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

"""The reference model's recipe: what is trained equals what is exported, and what is interrupted equals what is not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from foregate.cli.reference import app
from foregate.reference import recipe
from foregate.reference.card import render_card
from foregate.reference.corpus import Document, Domain, ManifestError, Source, documents, is_held_out, load_manifest
from foregate.reference.data import Batches, Corpus, DataError, build_corpus, load_corpus
from foregate.reference.evaluate import evaluate
from foregate.reference.export import export, read_exported, read_model_config
from foregate.reference.files import atomic_write, write_text
from foregate.reference.markup import from_html, from_pod, from_rst, tidy
from foregate.reference.model import ModelConfig, choose, experts, gather, head_loss, initial, logits, route
from foregate.reference.recipe import WEIGHTS, Request, RequestError, finish, prepare
from foregate.reference.recipe import train as run_training
from foregate.reference.schedule import Schedule
from foregate.reference.train import (
    STATE,
    Interrupt,
    LossCurve,
    StepStats,
    TrainConfig,
    Trainer,
    TrainingError,
    pick_layer,
    read_state,
)

TINY = ModelConfig(
    vocab_size=300, hidden_size=32, layers=2, experts=4, experts_per_token=2, expert_hidden=16,
    heads=2, kv_heads=1, head_dim=16, max_positions=64,
)  # fmt: skip
RUN = TrainConfig(tokens=1024, rows=4, length=16, warmup_steps=4, save_every=256, log_every=2, compile="off")


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def write_manifest(folder: Path, **changes: Any) -> Path:
    """A manifest of two domains with a few dozen tiny documents each, in `folder`."""
    for domain, word in (("left", "alpha beta gamma"), ("right", "delta {epsilon} = zeta")):
        (folder / domain).mkdir(exist_ok=True)
        for number in range(24):
            text = f"{word} number {number}, " + f"then {number * number} times {word}. " * 6
            (folder / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    sources = {
        name: [{"kind": "files", "title": name, "path": name, "glob": "*.txt", "licence": "CC0-1.0"}]
        for name in ("left", "right")
    }
    manifest = {
        "version": 1,
        "held_out_share": 0.2,
        "max_epochs": 100,
        "domains": {name: {"share": 0.5, "sources": sources[name]} for name in sources},
    }
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("corpus")
    return build_corpus(load_manifest(write_manifest(folder)), folder, folder / "tokens", TINY.vocab_size)


@pytest.fixture(scope="module")
def exported(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(TINY, dict(initial(TINY, seed=3)), corpus.tokenizer, folder)
    return folder


def drain(trainer: Trainer, until: int | None = None) -> list[StepStats]:
    """Run to the end, or send this process a SIGTERM after step `until`."""
    seen = []
    with Interrupt().installed() as interrupt:
        for stats in trainer.run(interrupt):
            seen.append(stats)
            if stats.step == until:
                os.kill(os.getpid(), signal.SIGTERM)
    return seen


def same(one: Trainer, other: Trainer) -> bool:
    return all(torch.equal(one.optimizer.masters[name], value) for name, value in other.optimizer.masters.items())


# --- the twin and the export ------------------------------------------------------------------------------------


def twin_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    config = read_model_config(folder)
    named = {name: value.float() for name, value in read_exported(folder).items()}
    return logits(config, gather(config, named), tokens)


@torch.no_grad()
def test_twin_equals_exported_transformers_model(exported: Path) -> None:
    tokens = torch.randint(TINY.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    torch.testing.assert_close(twin_logits(exported, tokens), model(tokens).logits, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_shipped_weights_load_and_equal_the_twin() -> None:
    if not (WEIGHTS / "model.safetensors").exists():
        pytest.skip("no shipped weights in this checkout")
    tokens = torch.randint(4096, (1, 48), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    torch.testing.assert_close(twin_logits(WEIGHTS, tokens), model(tokens).logits, atol=2e-3, rtol=1e-3)


def test_shipped_figures_state_a_finished_model_without_dead_experts() -> None:
    if not (WEIGHTS / "training.json").exists():
        pytest.skip("no training.json in this checkout")
    figures = recipe.read_figures(WEIGHTS)
    assert figures["training"]["finished"]
    assert figures["evaluation"]["dead_experts"] == []
    assert figures["model"]["file_bytes"] == (WEIGHTS / "model.safetensors").stat().st_size <= 60_000_000
    assert (WEIGHTS / "README.md").read_text(encoding="utf-8") == render_card(figures)


def test_export_has_one_tensor_per_expert_matrix(exported: Path) -> None:
    from safetensors import safe_open

    with safe_open(exported / "model.safetensors", "pt") as file:
        names = set(file.keys())
        shape = file.get_slice("model.layers.1.mlp.experts.3.down_proj.weight").get_shape()
    assert shape == [32, 16]
    assert (exported / "model.safetensors").stat().st_mode & 0o044 == 0o044  # an installed package is read by others
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names
    assert not any("lm_head" in name or "gate_up" in name for name in names)


def test_config_names_experts_as_published_ones_do(exported: Path) -> None:
    written = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    assert written["num_experts"] == written["num_local_experts"] == 4
    assert AutoConfig.from_pretrained(exported).num_experts == 4


def test_export_round_trips(exported: Path) -> None:
    for name, value in read_exported(exported).items():
        assert torch.equal(value, dict(initial(TINY, seed=3))[name].bfloat16()), name


def test_autotokenizer_equals_the_trained_tokenizer(exported: Path, corpus: Corpus) -> None:
    loaded = AutoTokenizer.from_pretrained(exported)
    text = "alpha 1234  beta\n\n\tdelta {epsilon} ünïcode 🙂 <|endoftext|>"
    assert loaded(text)["input_ids"] == corpus.tokenizer.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.bos_token_id, loaded.pad_token_id) == (0, 0, 1)


def test_documents_end_with_end_of_text(corpus: Corpus) -> None:
    for domain in corpus.domains:
        assert domain.train[-1] == 0
        assert (domain.train == 0).sum() == domain.documents


def dense_experts(config: ModelConfig, w: Any, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor) -> Any:
    """Every expert on every token, masked: the slow reference of the dispatch."""
    gate, up = torch.einsum("td,efd->etf", x, w.gate_up).chunk(2, dim=-1)
    out = torch.einsum("etf,edf->etd", F.silu(gate) * up, w.down)
    share = torch.zeros(x.shape[0], config.experts).scatter(1, chosen, weights)
    return torch.einsum("etd,te->td", out, share)


def test_dispatch_gradients_equal_dense_autograd() -> None:
    torch.manual_seed(0)
    named = {name: value.requires_grad_() for name, value in initial(TINY, seed=1)}
    w = gather(TINY, named).layers[0]
    x = torch.randn(20, TINY.hidden_size, requires_grad=True)
    grads = []
    for slow in (False, True):
        _, weights, chosen = choose(TINY, w, x)
        if slow:
            y = dense_experts(TINY, w, x, weights, chosen)
        else:
            y = experts(TINY, w, x, weights, route(chosen, TINY.experts, 20))
        grads.append(torch.autograd.grad(y.pow(2).sum(), (x, w.router, w.gate_up, w.down)))
    for fast, dense in zip(*grads, strict=True):
        torch.testing.assert_close(fast, dense, atol=1e-4, rtol=1e-3)


def test_full_expert_drops_its_latest_tokens_only() -> None:
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [3, 0]])
    routing = route(chosen, experts=4, capacity=2)
    assert routing.kept.tolist() == [[True, True], [True, True], [False, True], [True, False]]
    assert routing.filled.view(4, 2).sum(1).tolist() == [2, 2, 1, 1]
    flat = routing.slot[routing.kept]
    assert len(set(flat.tolist())) == flat.numel()


def test_chunked_head_loss_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foregate.reference.model.HeadLoss.CHUNK", 5)
    torch.manual_seed(0)
    hidden, embedding = torch.randn(2, 6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target = torch.randint(11, (2, 6))
    plain = F.cross_entropy((hidden @ embedding.t()).flatten(0, 1), target.flatten())
    ours = head_loss(hidden, embedding, target)
    torch.testing.assert_close(ours, plain)
    for one, other in zip(
        torch.autograd.grad(ours, (hidden, embedding)), torch.autograd.grad(plain, (hidden, embedding)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_unknown_compile_choice_is_refused() -> None:
    with pytest.raises(TrainingError, match="'fast'"):
        pick_layer("fast")


def test_compile_falls_back_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert pick_layer("auto")[1] is False
    with pytest.raises(TrainingError, match="no-such-compiler"):
        pick_layer("on")


# --- training ---------------------------------------------------------------------------------------------------


def test_training_lowers_the_loss(corpus: Corpus, tmp_path: Path) -> None:
    stats = drain(Trainer(TINY, replace(RUN, tokens=4096, learning_rate=1e-2), corpus, tmp_path))
    assert stats[-1].loss < stats[0].loss - 1.0
    assert stats[-1].tokens == 4096


def test_interrupted_and_resumed_equals_uninterrupted(corpus: Corpus, tmp_path: Path) -> None:
    whole = Trainer(TINY, RUN, corpus, tmp_path / "whole")
    straight = drain(whole)
    parts = drain(Trainer(TINY, RUN, corpus, tmp_path / "parts"), until=7)
    assert parts[-1].step == 7
    continued = Trainer.resumed(TINY, RUN, corpus, tmp_path / "parts")
    parts += drain(continued)
    assert [s.loss for s in parts] == [s.loss for s in straight]
    assert same(whole, continued)


def test_killed_run_continues_from_its_last_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    whole = Trainer(TINY, RUN, corpus, tmp_path / "whole")
    drain(whole)
    for stats in Trainer(TINY, RUN, corpus, tmp_path / "parts").run(Interrupt()):
        if stats.step == 6:
            break  # as SIGKILL: nothing is saved any more
    continued = Trainer.resumed(TINY, RUN, corpus, tmp_path / "parts")
    assert continued.step == 4
    drain(continued)
    assert same(whole, continued)


def test_more_tokens_continue_from_before_the_decay(corpus: Corpus, tmp_path: Path) -> None:
    drain(Trainer(TINY, RUN, corpus, tmp_path / "run"))
    longer = replace(RUN, tokens=2048)
    extended = Trainer.resumed(TINY, longer, corpus, tmp_path / "run")
    assert extended.step == RUN.steps - int(RUN.steps * RUN.decay_share)
    drain(extended)
    straight = Trainer(TINY, longer, corpus, tmp_path / "straight")
    drain(straight)
    assert same(straight, extended)


def test_tokens_below_what_has_decayed_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    drain(Trainer(TINY, RUN, corpus, tmp_path))
    with pytest.raises(TrainingError, match="512"):
        Trainer.resumed(TINY, replace(RUN, tokens=512), corpus, tmp_path)


def test_changed_capacity_is_recorded(corpus: Corpus, tmp_path: Path) -> None:
    drain(Trainer(TINY, RUN, corpus, tmp_path), until=3)
    narrower = Trainer.resumed(TINY, replace(RUN, capacity_factor=1.0), corpus, tmp_path)
    assert narrower.changes == [{"step": 3, "capacity_factor": [2.0, 1.0]}]
    drain(narrower, until=5)
    assert Trainer.resumed(TINY, replace(RUN, capacity_factor=1.0), corpus, tmp_path).changes == narrower.changes


def test_resume_refuses_another_corpus(corpus: Corpus, tmp_path: Path) -> None:
    drain(Trainer(TINY, RUN, corpus, tmp_path), until=1)
    with pytest.raises(DataError, match="changed"):
        Trainer.resumed(TINY, RUN, replace(corpus, digest="0" * 64), tmp_path)


def test_truncated_state_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(TrainingError, match=STATE):
        read_state(tmp_path / STATE)


def test_loss_curve_forgets_what_is_trained_again(tmp_path: Path) -> None:
    path = tmp_path / "loss.jsonl"
    stats = StepStats(0, 0, 1.0, 1.0, 0.0, 1.0, 1.0, 1e-3, 100.0, 1.0)
    curve = LossCurve(path, every=2, resumed_at=0)
    for step in range(1, 7):
        curve.add(replace(stats, step=step, loss=float(step)))
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.5, 3.5, 5.5]
    LossCurve(path, every=2, resumed_at=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4]


def test_schedule_warms_up_holds_and_decays() -> None:
    schedule = Schedule(peak=1.0, total=100, warmup=10, decay=20, final_ratio=0.0)
    assert schedule.rate(0) == pytest.approx(0.1)
    assert schedule.rate(9) == schedule.rate(50) == schedule.rate(80) == 1.0
    assert schedule.rate(90) == pytest.approx(0.5)
    assert schedule.decay_begins == 80


# --- the recipe -------------------------------------------------------------------------------------------------


def test_recipe_trains_evaluates_and_writes_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "continued_config", lambda state, **changes: RUN)
    request = Request(data_dir=tmp_path, manifest=write_manifest(tmp_path), run_dir=tmp_path / "run", threads=2)
    said: list[str] = []
    trainer = prepare(request, said.append, TINY)
    assert [stats.step for stats in run_training(request, trainer, Interrupt())] == list(range(2, 17, 2))
    folder = finish(request, trainer, said.append, tokens=64)
    figures = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    assert figures["training"]["finished"]
    assert figures["training"]["tokens"] == 1024
    assert (folder / "README.md").read_text(encoding="utf-8") == render_card(figures)
    assert {"left", "right"} == set(figures["evaluation"]["domains"])
    with pytest.raises(RequestError, match="--resume"):
        prepare(request, said.append, TINY)
    with pytest.raises(RequestError, match="seed 5"):
        prepare(replace(request, resume=True, seed=5), said.append)


def test_resume_without_a_run_starts_from_the_weights_and_says_so(
    tmp_path: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (exported / "training.json").write_text('{"training": {"tokens": 777}}', encoding="utf-8")
    monkeypatch.setattr(recipe, "WEIGHTS", exported)
    monkeypatch.setattr(recipe, "continued_config", lambda state, **changes: RUN)
    request = Request(data_dir=tmp_path, manifest=write_manifest(tmp_path), run_dir=tmp_path / "run", resume=True)
    said: list[str] = []
    trainer = prepare(request, said.append)
    assert any("starting from the shipped weights (777 tokens)" in line for line in said)
    assert trainer.tokens_seen == 777
    for name, value in read_exported(exported).items():
        assert torch.equal(trainer.optimizer.masters[name], value.float())


def test_evaluation_counts_every_choice_and_finds_dead_experts(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dict(initial(TINY, seed=3))
    named["layers.1.router"].zero_()  # ties go to the lowest numbers: experts 2 and 3 are never chosen
    export(TINY, named, corpus.tokenizer, tmp_path)
    figures = evaluate(tmp_path, corpus, length=16, tokens=64)
    assert set(figures.dead_experts) & {(1, 0), (1, 1), (1, 2), (1, 3)}
    assert sum(d.tokens for d in figures.domains.values()) == 128
    assert figures.layers[1].lowest == 0.0
    assert figures.layers[1].entropy == pytest.approx(0.5)


# --- corpus and manifest ----------------------------------------------------------------------------------------


def test_split_never_leaks_and_does_not_depend_on_the_machine() -> None:
    docs = [Document("math", f"doc {number}", "") for number in range(1000)]
    held_out = [doc.name for doc in docs if is_held_out(doc, 0.05)]
    assert 30 < len(held_out) < 70
    assert held_out[:3] == ["doc 6", "doc 52", "doc 64"]


def test_batches_keep_the_shares_and_repeat_nothing_within_an_epoch(corpus: Corpus) -> None:
    batches = Batches(corpus, rows=4, length=16, seed=0)
    blocks = [(len(domain.train) - 1) // 16 for domain in corpus.domains]
    steps = min(blocks) // 2
    rows = torch.cat([batches.step(step) for step in range(steps)])
    starts = {tuple(row.tolist()) for row in rows}
    assert rows.shape == (steps * 4, 17)
    assert max(batches.epochs(steps).values()) <= 1.0
    assert len(starts) > 0.9 * len(rows)  # equal texts exist, equal blocks hardly
    assert torch.equal(batches.step(3), Batches(corpus, rows=4, length=16, seed=0).step(3))


def test_too_many_epochs_are_refused_with_the_largest_number_of_tokens(corpus: Corpus) -> None:
    batches = Batches(replace(corpus, max_epochs=2), rows=4, length=16, seed=0)
    with pytest.raises(DataError, match=r"at most \d+ tokens"):
        batches.check(100_000)


def test_shares_too_small_for_a_step_are_refused(corpus: Corpus) -> None:
    with pytest.raises(DataError, match="rows"):
        Batches(corpus, rows=1, length=16, seed=0)


def test_missing_corpus_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path)):
        load_corpus(tmp_path)


def domain_of(**source: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["domains"]["left"]["sources"] = [source]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=9), "version 9"),
        (lambda m: m.update(colour="red"), "'colour'"),
        (lambda m: m.update(domains={}), "no domains"),
        (lambda m: m.update(held_out_share=0.9), "held_out_share 0.9"),
        (lambda m: m["domains"]["left"].update(share=0.9), "sum to 1.4"),
        (lambda m: m["domains"]["left"].update(share="half"), "'half'"),
        (lambda m: m["domains"]["left"].update(sources=[]), "'left' has no sources"),
        (domain_of(kind="carrier pigeon"), "'carrier pigeon'"),
        (domain_of(kind="files", path="x", markup="latex"), "'latex'"),
        (domain_of(kind="jsonl", path="x.jsonl"), "'template' is missing"),
        (domain_of(kind="stdlib", speed=3), "'speed'"),
    ],
)
def test_faulty_manifests_are_refused(tmp_path: Path, change: Callable[..., None], message: str) -> None:
    path = write_manifest(tmp_path)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ManifestError, match=message):
        load_manifest(path)


@pytest.mark.parametrize(("name", "text"), [("m.json", "{"), ("m.toml", "= 1"), ("m.yaml", "a: 1"), ("m.json", "[]")])
def test_unreadable_manifests_are_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match=name):
        load_manifest(tmp_path / name)
    with pytest.raises(ManifestError, match=r"absent\.json"):
        load_manifest(tmp_path / "absent.json")


def test_missing_sources_name_themselves_and_how_to_get_them(tmp_path: Path) -> None:
    source = Source(kind="files", title="Perl manual", path="nowhere", obtain="apt-get install perl-doc")
    with pytest.raises(ManifestError, match=r"'Perl manual'.*nowhere.*apt-get install perl-doc"):
        list(documents(Domain("prose", 1.0, (source,)), tmp_path))
    with pytest.raises(ManifestError, match="--data-dir"):
        list(documents(Domain("prose", 1.0, (source,)), None))
    empty = replace(source, path=".", glob="*.pod")
    with pytest.raises(ManifestError, match=r"\*\.pod"):
        list(documents(Domain("prose", 1.0, (empty,)), tmp_path))


def test_jsonl_source_names_the_faulty_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "' + "why " * 30 + '"}\n{"answer": 1}\n', encoding="utf-8")
    source = Source(kind="jsonl", path="q.jsonl", template="Q: {question}")
    with pytest.raises(ManifestError, match=r"q\.jsonl:2"):
        list(documents(Domain("math", 1.0, (source,)), tmp_path))


def test_hub_source_without_datasets_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    source = Source(kind="hub", dataset="some/corpus", template="{text}")
    with pytest.raises(ManifestError, match=r"some/corpus.*pip install datasets"):
        list(documents(Domain("prose", 1.0, (source,)), None))


def test_toml_manifest_equals_the_json_one(tmp_path: Path) -> None:
    pytest.importorskip("tomllib")
    (tmp_path / "m.toml").write_text(
        "version = 1\n[domains.code]\nshare = 1.0\n[[domains.code.sources]]\nkind = 'stdlib'\nexclude = ['test/*']\n"
    )
    assert load_manifest(tmp_path / "m.toml").domains == (
        Domain("code", 1.0, (Source(kind="stdlib", exclude=("test/*",)),)),
    )


def test_shipped_manifest_is_portable_and_trains_on_no_evaluation_text() -> None:
    manifest = load_manifest()
    assert [domain.name for domain in manifest.domains] == ["math", "code", "prose"]
    for source in (source for domain in manifest.domains for source in domain.sources):
        assert source.licence != "unknown"
        assert source.obtain
        assert "/work" not in source.path
        assert "gsm8k_test" not in source.path
        assert "mmlu" not in source.path.lower()


def test_duplicates_count_once(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the same words " * 10, encoding="utf-8")
    source = Source(kind="files", title="t", path=".", glob="*.txt")
    assert len(list(documents(Domain("prose", 1.0, (source,)), tmp_path))) == 1


def test_markup_is_stripped_and_code_kept() -> None:
    page = "<html><head><title>x</title></head><body><div class='navheader'>Prev<p>Next</div><p>Use  <b>it</b>.\n</p>"
    assert tidy(from_html(page)) == "Use it."
    assert "a\n  b < c" in from_html("<pre>a\n  b &lt; c</pre>")
    assert from_rst("See :func:`~os.path.join` and ``x``.") == "See os.path.join and x."
    assert from_pod("=head1 NAME\n\nUse C<< $x->{y} >> or L<perlop|perlop>, B<I<now>>.\n\n=cut\n").startswith("NAME")
    assert "B<" not in from_pod("B<I<now>>")


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_text(path, "old")

    def torn(temporary: Path) -> None:
        temporary.write_text("ne", encoding="utf-8")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, torn)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


def test_cli_shows_a_corpus_and_reports_errors(tmp_path: Path) -> None:
    arguments = ["corpus", "--manifest", str(write_manifest(tmp_path)), "--data-dir", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "left: left: 24 documents" in result.output
    failed = CliRunner().invoke(app, ["corpus", "--manifest", str(tmp_path / "none.json")])
    assert isinstance(failed.exception, ManifestError)


def test_cli_lists_its_commands() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert all(name in result.output for name in ("train", "corpus", "evaluate", "card", "speed"))


def test_cli_trains_and_refuses_to_overwrite_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the command sets it for good
    monkeypatch.setattr(recipe, "ModelConfig", lambda: TINY)
    monkeypatch.setattr(recipe, "continued_config", lambda state, **changes: RUN)
    manifest = str(write_manifest(tmp_path))
    arguments = ["train", "--manifest", manifest, "--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert isinstance(CliRunner().invoke(app, arguments).exception, RequestError)
    shown = CliRunner().invoke(app, ["card", str(tmp_path / "run" / "model")])
    assert shown.exit_code == 0, shown.output

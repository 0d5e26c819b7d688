"""Training itself: what is written, that it goes on where it was, and that it stops on NaN."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from qtool.checkpoint.output_place import hold_lock
from qtool.errors import QtoolError
from qtool.events import Note
from qtool.finetune.lora_targets import choose_layers
from qtool.finetune.records import (
    DataOptions,
    FinetuneRequest,
    FinetuneResult,
    LoraOptions,
    Progress,
    TrainingOptions,
)
from qtool.finetune.run import Prepared, prepare, train
from qtool.finetune.trainer import Watch

pytestmark = pytest.mark.usefixtures("enough_memory")

STORY = "Once upon a time there was a little girl named Lily. She had a red ball.\n"
PAIRS = [
    {"prompt": "The cat sat on the", "completion": f" mat number {number} and slept."}
    for number in range(12)
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def request_(test_data: Path, tmp_path: Path) -> FinetuneRequest:
    story = tmp_path / "story.txt"
    story.write_text("".join(f"{number} {STORY}" for number in range(60)))
    return FinetuneRequest(
        model=str(test_data / "models/stories260K-hf"),
        output=tmp_path / "out",
        device="cpu",
        data=DataOptions(source=str(story), max_length=32),
        lora=LoraOptions(r=4, dropout=0.1),
        training=TrainingOptions(lr=5e-3, max_steps=4, batch=2, grad_accum=2, save_steps=2),
    )


def with_training(request: FinetuneRequest, **changes: Any) -> FinetuneRequest:
    return replace(request, training=replace(request.training, **changes))


def with_data(request: FinetuneRequest, path: Path, rows: Any, **changes: Any) -> FinetuneRequest:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return replace(request, data=replace(request.data, source=str(path), **changes))


def run(request: FinetuneRequest, warnings: list[Any] | None = None) -> FinetuneResult:
    warn = (warnings if warnings is not None else []).append
    prepared = prepare(request, warn=warn)
    prepared.planned.require_fit()
    return train(prepared, warn=warn, on_progress=lambda progress: None)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("quant", ["nf4-dq", "int8"])
def test_qlora_makes_a_standard_adapter(
    request_: FinetuneRequest, tmp_path: Path, quant: Any
) -> None:
    text = f"7 {STORY}"
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"text": text}))
    request = with_training(replace(request_, quant=quant), max_steps=20)
    request = replace(request, data=replace(request.data, eval_split=str(held_out)))
    result = run(request)
    assert result.final_loss < result.first_loss - 0.3
    config = json.loads((request.output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path(request.model).resolve())
    assert config["target_modules"] == sorted(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    )
    assert not list(request.output.rglob("README.md"))
    matrices = adapter(request.output)
    assert sum(matrix.numel() for matrix in matrices.values()) == result.trainable_parameters
    # Stock PEFT takes it over the full-precision base, as the sum of the two.
    ids = AutoTokenizer.from_pretrained(request.model)(f"{text}</s>", return_tensors="pt").input_ids
    ids = ids[:, : request.data.max_length]
    base = AutoModelForCausalLM.from_pretrained(request.model, dtype=torch.float32)
    before = base(ids, labels=ids).loss.item()
    summed = copy.deepcopy(base)
    add_by_hand(summed, matrices, scaling=config["lora_alpha"] / config["r"])
    expected = summed(ids, labels=ids).loss.item()
    model = peft.PeftModel.from_pretrained(base, str(request.output))
    assert model(ids, labels=ids).loss.item() == pytest.approx(expected, rel=1e-5)
    # There it does what it learned over the packed base, but for what packing costs.
    assert result.eval_loss is not None
    assert expected == pytest.approx(result.eval_loss, abs=0.1)
    assert expected < before - 0.3


def add_by_hand(model: Any, matrices: dict[str, torch.Tensor], scaling: float) -> None:
    """W + s B A for each layer that an adapter's file has matrices of."""
    prefix, end = "base_model.model.", ".lora_A.weight"
    for name, narrow in matrices.items():
        if name.endswith(end):
            wide = matrices[name.replace(".lora_A.", ".lora_B.")]
            layer = model.get_submodule(name.removeprefix(prefix).removesuffix(end))
            layer.weight.data += scaling * wide @ narrow


def test_the_manifest_says_what_was_done(request_: FinetuneRequest, test_data: Path) -> None:
    result = run(request_)
    manifest = json.loads((request_.output / "qtool_finetune.json").read_text())
    assert manifest["model"] == {"id": request_.model, "revision": None, "quant": "nf4-dq"}
    assert manifest["data"][0]["source"] == request_.data.source
    assert len(manifest["data"][0]["sha256"]) == 64
    assert manifest["options"]["lora_r"] == 4
    assert manifest["options"]["lr"] == 5e-3
    assert set(manifest["versions"]) >= {"torch", "peft", "trl", "transformers"}
    assert "adapter_model.safetensors" in manifest["files"]
    assert FinetuneResult.from_manifest(manifest) == result
    assert [step.step for step in result.history] == [1, 2, 3, 4]
    assert result.tokens == 4 * 2 * 2 * 32
    assert result.planned_peak_bytes and result.planned_allocated_peak_bytes
    assert result.allocated_peak_bytes is None


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    request_: FinetuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    request = with_training(request_, optimizer=optimizer, max_steps=6, save_steps=3)
    data = replace(request.data, eval_split="0.1")
    request = replace(request, data=data, lora=LoraOptions(r=16, dropout=0.1))
    expected = run(request)
    stopped = replace(request, output=tmp_path / "stopped")
    stop_after(monkeypatch, 5)  # between saves, in the middle of an epoch
    with pytest.raises(QtoolError, match="interrupted after step 5 of 6; it is saved") as caught:
        run(stopped)
    assert caught.value.exit_code == 130
    monkeypatch.undo()
    with pytest.raises(QtoolError, match="holds an unfinished run"):
        run(stopped)
    resumed = run(replace(stopped, resume=True))
    assert resumed.resumed_from_step == 5
    assert resumed.history == expected.history
    assert resumed.eval_history == expected.eval_history
    assert resumed.tokens == expected.tokens
    assert (expected.earlier_tokens, resumed.earlier_tokens) == (0, 5 * 2 * 2 * 32)
    found, wanted = adapter(stopped.output), adapter(request.output)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Asked again it has nothing to do; asked for something else it says what.
    assert run_finished(replace(stopped, resume=True)) == resumed
    with pytest.raises(QtoolError, match=r"lr is 0\.005 there, 0\.1 now"):
        run_finished(replace(with_training(stopped, lr=0.1), resume=True))
    with pytest.raises(QtoolError, match="source is"):
        other = replace(stopped.data, source=shorter_text(stopped.data.source, tmp_path))
        run_finished(replace(stopped, data=other, resume=True))


@pytest.mark.parametrize("is_finished", [True, False])
def test_what_model_and_data_name_counts_not_how_that_is_spelled(
    request_: FinetuneRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_finished: bool
) -> None:
    work = tmp_path / "work"
    shutil.copytree(request_.model, work / "model")
    for name in ("story.txt", "held_out.txt"):
        shutil.copy(request_.data.source, work / name)

    def named(model: str, story: str, held_out: str, **changes: Any) -> FinetuneRequest:
        data = replace(request_.data, source=story, eval_split=held_out)
        return replace(request_, model=model, data=data, **changes)

    monkeypatch.chdir(work)
    names = ("model", "story.txt", "held_out.txt")
    if not is_finished:
        stop_after(monkeypatch, 2)
    with nullcontext() if is_finished else pytest.raises(QtoolError, match="interrupted"):
        run(named(*names))
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    go_on = run_finished if is_finished else run
    for spelled in ("./work/{}", f"{work}/{{}}", f"../{tmp_path.name}/work/{{}}"):
        result = go_on(named(*map(spelled.format, names), resume=True))
        assert result is not None and result.steps == 4
        go_on = run_finished  # which it is then
    # What has the same name elsewhere is another model.
    shutil.copytree(work, tmp_path / "other")
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(QtoolError, match=f'model is "{work}/model" there, ".*/other/model" now'):
        go_on(named(*names, resume=True))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("result", None, "expected 'result', found nothing"),
        ("result", [], "not as a finished run has it"),
        ("result", {"steps": "4"}, "steps is '4'"),
        ("result", {}, "missing"),
        ("losses", [[1, 0.5]], "not enough values"),
        ("losses", [[1, None, 0.5]], "NoneType"),
        ("options", 3, "not a mapping"),
        ("data", [3], "not subscriptable"),
    ],
)
def test_a_damaged_manifest_is_told(
    request_: FinetuneRequest, key: str, value: Any, said: str
) -> None:
    result = run(request_)
    path = request_.output / "qtool_finetune.json"
    whole = json.loads(path.read_text())
    assert run_finished(replace(request_, resume=True)) == result
    changed = {name: part for name, part in whole.items() if name != key}
    path.write_text(json.dumps(changed if value is None else changed | {key: value}))
    with pytest.raises(QtoolError, match=f"{path}: .*{said}") as caught:
        run_finished(replace(request_, resume=True))
    assert caught.value.kind == "bad_file"
    path.unlink()  # as the hint has it
    again = run(replace(request_, resume=True))
    assert (again.history, again.resumed_from_step) == (result.history, 4)


def shorter_text(source: str, folder: Path) -> str:
    path = folder / "shorter.txt"
    path.write_text(Path(source).read_text()[:-100])
    return str(path)


def test_measuring_changes_nothing(request_: FinetuneRequest, tmp_path: Path) -> None:
    """Dropout goes on with the random numbers that it would have had."""
    data = replace(request_.data, eval_split="0.1")
    request = replace(request_, data=data, lora=LoraOptions(r=16, dropout=0.1))
    seldom = with_training(request, max_steps=4, save_steps=4)
    often = replace(with_training(request, max_steps=4, save_steps=1), output=tmp_path / "often")
    assert run(often).history == run(seldom).history
    found, wanted = adapter(often.output), adapter(seldom.output)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_the_held_out_loss_is_that_of_a_token_whatever_the_batch(
    request_: FinetuneRequest, tmp_path: Path
) -> None:
    """Rows of unequal length: the mean of the batches' means would be another for each batch."""
    texts = ["Yes.", STORY * 2, "No, no.", "Once upon a time", "A cat."]
    rows = tmp_path / "held_out.jsonl"
    rows.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    data = replace(request_.data, eval_split=str(rows), max_length=128)
    request = replace(request_, method="lora", data=data)
    request = with_training(request, lr=1e-9, max_steps=1, compute_dtype="float32")
    wanted = loss_per_token(request.model, texts)
    for number, (batch, packing) in enumerate([(1, False), (3, False), (4, False), (2, True)]):
        data = replace(request.data, packing=packing)
        one = replace(with_training(request, batch=batch), data=data, output=tmp_path / f"{number}")
        assert run(one).eval_loss == pytest.approx(wanted, rel=1e-5), (batch, packing)


def loss_per_token(model: str, texts: list[str]) -> float:
    """Of texts that all end with the end token, by transformers in float64."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0]
        total += float(functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
        count += len(ids) - 1
    return total / count


def run_finished(request: FinetuneRequest) -> FinetuneResult | None:
    return prepare(request, warn=lambda words: None).finished


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Watch.on_step_end

    def stopping(self: Watch, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            self.stop_signal = 2
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", stopping)


def test_the_speed_of_a_resumed_run_is_that_of_its_own_tokens(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 3)
    with pytest.raises(QtoolError, match="interrupted"):
        run(request_)
    monkeypatch.undo()
    clock = count(0.0, 10.0)
    ticking = SimpleNamespace(perf_counter=lambda: next(clock))
    monkeypatch.setattr("qtool.finetune.trainer.time", ticking)
    shown: list[Progress] = []
    prepared = prepare(replace(request_, resume=True), warn=lambda words: None)
    result = train(prepared, warn=lambda words: None, on_progress=shown.append)
    # One step, of 128 tokens; after it the clock is looked at twice.
    assert (result.tokens, result.earlier_tokens) == (4 * 128, 3 * 128)
    assert shown[0].tokens_per_s == 128 / 10
    assert result.tokens_per_s == 128 / 20


def test_space_is_asked_for_before_the_model_is_loaded(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_bytes = 0
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, free_bytes))
    with pytest.raises(QtoolError, match="the result and the saves need") as caught:
        run(request_)
    assert (caught.value.kind, caught.value.exit_code) == ("no_space", 5)
    assert not request_.output.exists()
    wanted = int(caught.value.message.split(" need ")[1].split(" ")[0].replace(",", ""))
    free_bytes = wanted
    result = run(request_)  # two saves, and the adapter: two moments beside each weight
    weights = 4 * result.trainable_parameters
    assert wanted == pytest.approx(2 * 3 * weights + weights, rel=0.01)
    found = [*request_.output.rglob("*.safetensors"), *request_.output.rglob("optimizer.pt")]
    assert wanted <= sum(path.stat().st_size for path in found)


def test_a_disk_that_fills_up_keeps_the_save(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    def fill(*given: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    request = replace(with_training(request_, save_steps=1), lora=LoraOptions(r=64))
    monkeypatch.setattr("qtool.finetune.run.RunFolder.finish", fill)
    with pytest.raises(QtoolError, match="the save after step 4 is kept") as caught:
        run(request)
    assert caught.value.exit_code == 5
    monkeypatch.undo()
    # What is left wants no space for another save, and the adapter takes the place of its half.
    usage = shutil._ntuple_diskusage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 40, 0, 0))
    assert run(replace(request, resume=True)).resumed_from_step == 4


def test_a_result_that_is_interrupted_is_written_by_the_next(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: Any) -> None:
        (request_.output / "checkpoints/result/model-00002.safetensors").write_text("half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("qtool.finetune.run.RunFolder.finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(request_)
    monkeypatch.undo()
    assert not (request_.output / "adapter_config.json").exists()
    assert run(replace(request_, resume=True)).resumed_from_step == 4
    manifest = json.loads((request_.output / "qtool_finetune.json").read_text())
    assert manifest["files"] == ["adapter_config.json", "adapter_model.safetensors"]


def test_one_process_at_a_time_writes(request_: FinetuneRequest) -> None:
    """And the second one finds what the first one began, though it looked before that."""
    early = prepare(request_, warn=lambda words: None)
    checkpoints = request_.output / "checkpoints"
    checkpoints.mkdir(parents=True)
    with (
        hold_lock(checkpoints / ".lock", request_.output),
        pytest.raises(QtoolError, match="another qtool process is writing"),
    ):
        start(early)
    assert [path.name for path in checkpoints.iterdir()] == [".lock"]
    first = run(request_)
    other = prepare(replace(request_, restart=True), warn=lambda words: None)
    late = replace(early, planned=replace(other.planned, request=with_training(request_, lr=0.1)))
    with pytest.raises(QtoolError, match="holds a finished run"):
        start(late)
    assert run_finished(replace(request_, resume=True)) == first


def start(prepared: Prepared) -> None:
    train(prepared, warn=lambda words: None, on_progress=lambda progress: None)


def test_other_settings_cannot_go_on(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 2)
    with pytest.raises(QtoolError, match="interrupted"):
        run(request_)
    monkeypatch.undo()
    other = replace(with_training(request_, batch=1), resume=True)
    with pytest.raises(QtoolError, match="batch is 2 there, 1 now"):
        run(other)
    result = run(replace(with_training(request_, batch=1), restart=True))
    assert (result.steps, result.resumed_from_step) == (4, None)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nan_stops_before_it_is_saved(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    request = with_training(request_, max_steps=8)
    from qtool.finetune.trainer import Trainer

    original = Trainer.compute_loss

    def broken(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, inputs, *args, **kwargs)
        if self.state.global_step < 3:
            return loss
        if where == "loss":
            return loss * float("nan")
        return loss + (loss * 0).sqrt()  # an infinite slope where nothing is to be seen

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(QtoolError, match="at step 4, so training stopped") as caught:
        run(request)
    assert caught.value.exit_code == 1
    assert "the last save is kept" in str(caught.value)
    assert caught.value.hint.startswith("restart with a lower lr='0.00125'")
    saves = sorted(path.name for path in (request.output / "checkpoints").glob("checkpoint-*"))
    assert saves == ["checkpoint-2"]


def test_nan_before_any_save_promises_none(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.finetune.trainer import Trainer

    original = Trainer.compute_loss
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda *args, **kwargs: original(*args, **kwargs) * float("nan")
    )
    with pytest.raises(QtoolError, match=r"at step 1, .*; nothing was saved before it") as caught:
        run(request_)
    assert "look for NaN in its weights" in caught.value.hint  # no update was made
    monkeypatch.undo()
    notes: list[Any] = []
    prepared = prepare(replace(request_, resume=True), warn=notes.append)
    train(prepared, warn=notes.append, on_event=notes.append, on_progress=lambda progress: None)
    assert Note("resume   no save yet: from the start") in notes


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_that_lacks_the_result_alone_takes_no_step_more(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    request = replace(request_, method=method)
    request = with_training(request, scheduler="constant", lr=1e-3)
    expected = run(replace(request, output=request.output.with_name("whole")))

    def fail(*arguments: Any) -> None:
        raise OSError("killed")

    monkeypatch.setattr("qtool.finetune.run_folder.RunFolder.finish", fail)
    with pytest.raises(OSError, match="killed"):
        run(request)
    monkeypatch.undo()
    resumed = run(replace(request, resume=True))
    assert (resumed.steps, resumed.history) == (expected.steps, expected.history)
    assert resumed.earlier_tokens == resumed.tokens == expected.tokens
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    whole = request.output.with_name("whole")
    assert (request.output / name).read_bytes() == (whole / name).read_bytes()


def test_lora_on_a_mixture_adapts_what_the_plan_counts(
    request_: FinetuneRequest, test_data: Path
) -> None:
    request = replace(request_, model=str(test_data / "models/tinymoe-6m"), method="lora")
    request = with_training(request, max_steps=1)
    result = run(request)
    config = json.loads((request.output / "adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    planned = prepare(replace(request, resume=True), warn=lambda words: None).planned.plan
    assert planned.components["adapters"].bytes == 4 * result.trainable_parameters
    model = AutoModelForCausalLM.from_pretrained(request.model)
    assert choose_layers(model, ["q_proj"]) == ["q_proj"]
    with pytest.raises(QtoolError, match="takes some of them for the experts"):
        choose_layers(model, ["q_proj", "up_proj"])
    with pytest.raises(QtoolError, match="mixture of 8 experts") as caught:
        run(replace(request, method="qlora", restart=True))
    assert "method=lora" in caught.value.hint.replace("'", "")


def test_full_trains_all_weights_into_a_checkpoint(request_: FinetuneRequest) -> None:
    request = with_training(replace(request_, method="full"), lr=1e-3, max_steps=6)
    result = run(request)
    assert result.final_loss < result.first_loss
    model = AutoModelForCausalLM.from_pretrained(request.output)
    assert result.trainable_parameters == sum(p.numel() for p in model.parameters())
    base = AutoModelForCausalLM.from_pretrained(request.model, dtype=model.dtype)
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    assert all(not torch.equal(new, old) for new, old in pairs)
    assert (request.output / "tokenizer.json").is_file()


def test_lora_trains_a_base_that_is_not_packed(request_: FinetuneRequest) -> None:
    result = run(with_training(replace(request_, method="lora"), optimizer="lion", lr=1e-3))
    assert result.quant is None
    assert result.final_loss < result.first_loss


def test_prompts_are_not_learned(request_: FinetuneRequest, tmp_path: Path) -> None:
    request = with_data(replace(request_, method="lora"), tmp_path / "pairs.jsonl", PAIRS)
    request = with_training(request, batch=12, grad_accum=1, max_steps=1, compute_dtype="float32")
    learned = run(request)
    data = replace(request.data, completion_only=False)
    everything = run(replace(request, output=tmp_path / "all", data=data))
    of_prompts, of_completions = losses_of_pairs(request.model)
    expected = torch.cat(of_completions).mean()
    assert learned.first_loss == pytest.approx(float(expected), rel=1e-5)
    expected = torch.cat([*of_prompts, *of_completions]).mean()
    assert everything.first_loss == pytest.approx(float(expected), rel=1e-5)
    assert learned.tokens == everything.tokens


def losses_of_pairs(model: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each token of the prompts and of the completions of PAIRS, by transformers in float64."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(model)
    parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for pair in PAIRS:
        prompt = tokenizer(pair["prompt"])["input_ids"]
        ids = torch.tensor(tokenizer(f"{pair['prompt']}{pair['completion']}</s>")["input_ids"])
        assert ids[: len(prompt)].tolist() == prompt
        with torch.no_grad():
            logits = network(input_ids=ids[None]).logits[0]
        losses = functional.cross_entropy(logits[:-1], ids[1:], reduction="none")
        parts[0].append(losses[: len(prompt) - 1])
        parts[1].append(losses[len(prompt) - 1 :])
    return parts


def test_packing_changes_no_loss(request_: FinetuneRequest, tmp_path: Path) -> None:
    """Sequences in one row do not see each other: the mean over all tokens is the same."""
    request = with_data(request_, tmp_path / "pairs.jsonl", PAIRS, max_length=128)
    request = replace(request, lora=LoraOptions(dropout=0.0))
    request = with_training(request, batch=12, grad_accum=1, max_steps=1, compute_dtype="float32")
    one_by_one = run(request)
    packed = replace(request, output=tmp_path / "packed", data=replace(request.data, packing=True))
    assert run(packed).first_loss == pytest.approx(one_by_one.first_loss, rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quant": "nf4", "method": "lora"}, "wants a 16-bit base"),
        ({"method": "full", "quant": "int8"}, "trains all weights"),
        ({"lora": LoraOptions(targets=("q_porj",))}, "'q_porj' matches no linear layer"),
        ({"lora": LoraOptions(targets=("lm_haed",))}, "'lm_haed' matches no linear layer"),
        ({"lora": LoraOptions(targets=("q_proj", "lm_head"))}, "lm_head is the output head"),
        ({"training": TrainingOptions(optimizer="adamm")}, "optimizer 'adamm' is not known"),
        ({"device": "cuda:7"}, "cuda"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    request_: FinetuneRequest, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(QtoolError, match=said) as caught:
        run(replace(request_, **changes))
    assert "lm_head" not in caught.value.hint


def test_a_length_beyond_the_context_is_refused(request_: FinetuneRequest) -> None:
    request = replace(request_, data=replace(request_.data, max_length=100_000))
    with pytest.raises(QtoolError, match="was made for 512 tokens"):
        run(request)


def test_what_does_not_fit_is_not_begun(
    request_: FinetuneRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.finetune import plan
    from qtool.planner.gpus import vram_class

    monkeypatch.setattr(plan, "_training_device", lambda device: vram_class(0.125))
    with pytest.raises(QtoolError, match="training needs") as caught:
        run(request_)
    assert (caught.value.kind, caught.value.exit_code) == ("no_fit", 3)
    assert not request_.output.exists()
    assert run(replace(request_, force=True)).steps == 4


def test_cut_sequences_are_told_of(request_: FinetuneRequest, tmp_path: Path) -> None:
    request = with_data(request_, tmp_path / "rows.jsonl", [{"text": STORY * 3}] * 8)
    warnings: list[Any] = []
    run(request, warnings)
    assert any("8 of 8 sequences are longer than" in str(words) for words in warnings)

"""What an evaluation says of texts: what is a loss, what was left out, and which engine they come from."""

import json
from functools import partial

import pytest
import torch
from conftest import prompts_of, tiny_proposer, tiny_speculator

import fms_spec.decoding
from data.prompts import Prompt
from fms_spec.base_model import BaseModel
from fms_spec.decoding import decode, stream
from fms_spec.errors import UserError
from fms_spec.loading import load_for_decoding
from fms_spec.options import DecodingOptions
from fms_spec.speculators.directory import describe, save_speculator
from pipelines.generate import vllm_engine
from pipelines.measure.decode import benchmark_decode
from pipelines.measure.evaluate import evaluate
from pipelines.measure.figures import TURNS, context_range, losslessness, summary
from pipelines.measure.samples import before_step, decode_in_turn, logit_gap, parting, settle, usual_methods
from pipelines.show.console import GROUPS, print_groups, print_results, print_values
from scripts.evaluate import Arguments

NEW_TOKENS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory, model_dir, shared_base_model):
    """A directory with base_model/ and an untrained speculator/ for it."""
    place = tmp_path_factory.mktemp("evaluate")
    (place / "base_model").symlink_to(model_dir)
    speculator = tiny_speculator(shared_base_model, "mlp_untied", n_predict=3)
    save_speculator(place / "speculator", speculator, describe(speculator, shared_base_model))
    return place


def judged(place, dtype, prompts, load=load_for_decoding):
    """(`losslessness`, samples) of prompts, judged the way the script does it."""
    load = partial(load, str(place / "base_model"), place / "speculator")
    base_model, _, proposer = load(dtype=dtype)
    samples = decode_in_turn(base_model, prompts, usual_methods(proposer), NEW_TOKENS)
    del base_model, proposer
    samples, _ = settle(samples, [], load, NEW_TOKENS)
    return losslessness(samples, prompts), samples


def prompts_like(*lengths):
    return [Prompt(None, tokens) for tokens in prompts_of(*lengths)]


def swayed(only=None):
    """`BaseModel.logits` whose forwards over several tokens favour another token; in dtype `only`, like rounding, or in every one."""
    honest = BaseModel.logits

    def logits(self, states):
        found = honest(self, states)
        if states.dim() == 3 and states.shape[1] > 1 and only in (None, self.dtype):
            found = found.roll(1, -1)
        return found

    return logits


def test_a_difference_in_bf16_that_float32_does_not_confirm_is_no_loss(place, monkeypatch):
    monkeypatch.setattr(BaseModel, "logits", swayed(torch.bfloat16))
    values, samples = judged(place, "bfloat16", prompts_like(5, 9))
    assert values == {"lossless": True, "texts": 2, "parting_by_rounding": 2, "differing": 0, "prompts": 2, "left_out": 0}
    assert {sample.verdict for sample in samples if sample.kind == "plain"} == {"equal"}


class Loads(list):
    """`load_for_decoding` that keeps (dtype, device) of each call; a GPU has no room for float32 where `small`."""

    small = False

    def __call__(self, *models, dtype, device=None):
        self.append((dtype, device))
        if self.small and dtype == "float32" and device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load_for_decoding(*models, dtype=dtype, device=device)


def test_a_difference_that_float32_confirms_is_a_loss(place, monkeypatch):
    monkeypatch.setattr(BaseModel, "logits", swayed())
    values, _ = judged(place, "bfloat16", prompts_like(5, 9))
    assert values["lossless"] is False and values["differing"] == 2 and values["parting_by_rounding"] == 0


def test_a_difference_in_float32_is_a_loss_and_equal_texts_need_no_second_look(place, monkeypatch):
    loads = Loads()
    assert judged(place, "float32", prompts_like(5, 9), loads)[0]["lossless"] is True
    monkeypatch.setattr(BaseModel, "logits", swayed())
    values, _ = judged(place, "float32", prompts_like(5, 9), loads)
    assert values["lossless"] is False and values["differing"] == 2 and loads == [("float32", None)] * 2


def test_accepting_what_the_base_model_would_not_say_is_a_loss(place, monkeypatch):
    honest = fms_spec.decoding.match

    def gullible(candidates, chosen):
        if candidates.tokens.shape[1]:
            chosen = chosen.clone()
            chosen[:, 0] = candidates.tokens[:, 0]
        return honest(candidates, chosen)

    monkeypatch.setattr(fms_spec.decoding, "match", gullible)
    values, _ = judged(place, "bfloat16", prompts_like(5, 9))
    assert values["lossless"] is False and values["differing"] == 2


def test_where_float32_does_not_fit_the_device_the_cpu_judges(place, monkeypatch):
    monkeypatch.setattr(BaseModel, "logits", swayed(torch.bfloat16))
    loads = Loads()
    loads.small = True
    values, _ = judged(place, "bfloat16", prompts_like(5), loads)
    assert values["parting_by_rounding"] == 1 and loads == [("bfloat16", None), ("float32", None), ("float32", "cpu")]


def test_a_judged_text_begins_so_that_the_step_in_question_is_its_first(base_model):
    (prompt,), options = prompts_of(7), DecodingOptions(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    proposer = tiny_proposer(base_model, "best", widths=(1, 1, 1), extra=60)  # many candidates: some are accepted
    (text,), _ = decode(base_model, [prompt], options, proposer)
    assert sum(text.accepted) > 2
    for place in range(1, NEW_TOKENS):
        kept = before_step(text.accepted, place)
        prefix = torch.cat([prompt, torch.tensor(text.tokens[:kept], dtype=torch.int64)])
        steps = stream(base_model, [prefix], options, proposer)
        (read,), (first,) = next(steps), next(steps)
        assert read.tokens == [text.tokens[kept]] and kept + 1 <= place < kept + 1 + len(first.tokens)
        assert first.tokens[place - kept - 1] == text.tokens[place]
    assert before_step(text.accepted, 0) == 0


def test_texts_part_at_their_first_difference_or_where_one_ends(base_model):
    assert parting([1, 2], [1, 2]) is None and parting([1, 2, 3], [1, 4, 3]) == 1 and parting([1, 2], [1, 2, 3]) == 2
    (prompt,) = prompts_of(6)
    whole = torch.cat([prompt, torch.tensor([3])])[None]
    logits = base_model.logits(base_model.hidden_states(whole, torch.zeros_like(whole)))[0, -1]
    assert logit_gap(base_model, prompt, [3, 8, 1], [3, 5]) == pytest.approx((logits[8] - logits[5]).abs().item())
    assert logit_gap(base_model, prompt, [3], [3]) is None and logit_gap(base_model, prompt, [3], [3, 4]) is None


class Talk:
    """A chat of three turns whose third is long."""

    category, source, role, first_turn, turns = "chat", None, "user", 1, 3

    def tokens(self, replies):
        return prompts_of(5 if len(replies) < 2 else 250, seed=len(replies))[0]


def test_turns_over_the_context_are_left_out_and_counted(place):
    prompts = [*prompts_like(240, 5), Talk()]
    values, samples = judged(place, "float32", prompts)
    assert values["left_out"] == 2 and values["texts"] == 3 and values["prompts"] == 2
    assert [sample.prompt for sample in samples if sample.kind == "plain"] == [1, 2, 2]


def test_a_prompt_that_just_fits_is_decoded_and_a_longer_one_is_not(base_model):
    ways = usual_methods(tiny_proposer(base_model, "chain", widths=(1, 1, 1)))
    fits = base_model.context_length - NEW_TOKENS - 3
    samples = decode_in_turn(base_model, prompts_like(fits + 1, fits), ways, NEW_TOKENS)
    assert [sample.prompt_length for sample in samples] == [fits] * 3
    with pytest.raises(UserError, match="every prompt") as caught:
        decode_in_turn(base_model, prompts_like(fits + 1), ways, NEW_TOKENS)
    assert "\n" not in str(caught.value)


def test_the_script_reports_what_was_left_out(place, tmp_path, capsys):
    lines = [{"prompt": "w1 w2 w3"}, {"prompt": " ".join(["w4"] * 250)}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = dict(base_model=str(place / "base_model"), speculator=str(place / "speculator"), prompts=str(tmp_path / "prompts.jsonl"))
    evaluate(Arguments(**words, max_new_tokens=8, out=str(tmp_path / "report.json")))
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["left_out"] == 1 and report["texts"] == report["prompts"] == 1 and report["lossless"] is True
    assert "left_out" in capsys.readouterr().out and "against" not in report


def base_model_with(place, folder, name, text):
    """The base model of `place` with another file, in folder/base_model."""
    (folder / "base_model").mkdir()
    for file in (place / "base_model").iterdir():
        (folder / "base_model" / file.name).symlink_to(file)
    (folder / "base_model" / name).unlink(missing_ok=True)
    (folder / "base_model" / name).write_text(text)


def test_texts_are_grouped_by_category_turn_and_length_of_context_each_with_its_count_and_interval(place, tmp_path, capsys):
    lines = [
        {"category": "[/talk] $_$", "turns": ["w1 w2", "w3"]}, {"category": "[/talk] $_$", "turns": ["w4", "w5", "w6"]},
        {"prompt": " ".join(["w7 w8"] * 70), "category": "long"}, {"prompt": "w9"},
    ]  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    base_model_with(place, tmp_path, "chat_template.jinja", "{% for m in messages %}{{ m.content }} {% endfor %}")
    words = dict(base_model=str(tmp_path / "base_model"), speculator=str(place / "speculator"), prompts=str(tmp_path / "prompts.jsonl"))
    evaluate(Arguments(**words, max_new_tokens=8, dtype="float32", out=str(tmp_path / "report.json")))
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    counts = {kind: {name: (group["prompts"], group["texts"]) for name, group in report[kind].items()} for kind in GROUPS}
    assert counts == {
        "categories": {"[/talk] $_$": (2, 5), "long": (1, 1), "other": (1, 1)}, "sources": {},
        "turns": {"1": (2, 2), "2": (2, 2), "3": (1, 1)}, "roles": {"user": (2, 5)},
        "contexts": {"1 to 128": (3, 6), "129 to 512": (1, 1)},
    }  # fmt: skip
    for kind in ("categories", "contexts"):
        for figure in ("draft_steps", "new_tokens"):
            assert sum(group[figure] for group in report[kind].values()) == report[figure]
    for group in [group for kind in GROUPS for group in report[kind].values()]:
        for figure in ("acceptance_length", "tokens_per_forward", "speedup"):
            low, high = group[f"{figure}_interval"]
            assert low - 1e-9 <= group[figure] <= high + 1e-9
    assert "turn 2" in printed and "129 to 512 tokens" in printed and "[/talk] $_$" in printed


def test_a_group_of_texts_that_end_at_once_has_no_speed_and_the_report_is_json_all_the_same(place, base_model, tmp_path):
    first, second = prompts_of(5, 6)
    (text,), _ = decode(base_model, [first], DecodingOptions(max_new_tokens=1))
    base_model_with(place, tmp_path, "generation_config.json", json.dumps({"eos_token_id": text.tokens}))
    prompts = {"ends": first, "on": second}
    lines = [{"prompt": " ".join(f"w{token - 2}" for token in tokens), "category": name} for name, tokens in prompts.items()]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = dict(base_model=str(tmp_path / "base_model"), speculator=str(place / "speculator"), prompts=str(tmp_path / "prompts.jsonl"))
    evaluate(Arguments(**words, max_new_tokens=4, dtype="float32", out=str(tmp_path / "report.json")))
    written = (tmp_path / "report.json").read_text()
    groups = json.loads(written)["categories"]
    assert "NaN" not in written and groups["ends"]["speedup"] is None and groups["ends"]["texts"] == 1 and groups["on"]["speedup"] > 0


def test_turns_and_contexts_past_the_last_that_are_told_apart_are_one_group(base_model):
    class Longer(Talk):
        turns = TURNS + 2

        def tokens(self, replies):
            return prompts_of(5 + 2 * len(replies))[0]

    proposer = tiny_proposer(base_model, "chain", widths=(1, 1))
    samples = decode_in_turn(base_model, [Longer()], usual_methods(proposer), 4)
    assert list(summary(samples, proposer)["turns"]) == [*map(str, range(1, TURNS + 1)), f"over {TURNS}"]
    assert [context_range(length) for length in (1, 128, 129, 512, 8192, 8193)] == [
        "1 to 128", "1 to 128", "129 to 512", "129 to 512", "2049 to 8192", "over 8192",
    ]  # fmt: skip


def test_texts_are_grouped_by_source_and_by_whose_message_they_answer_where_that_is_known(base_model, capsys):
    told = [("user", "chats"), ("tool", "chats"), ("user", "sums"), (None, None)]
    prompts = [Prompt(None, tokens, 1, *facts) for tokens, facts in zip(prompts_of(5, 6, 7, 8), told)]
    proposer = tiny_proposer(base_model, "chain", widths=(1, 1))
    values = summary(decode_in_turn(base_model, prompts, usual_methods(proposer), 4), proposer)
    counts = {kind: {name: group["texts"] for name, group in values[kind].items()} for kind in ("sources", "roles")}
    assert counts == {"sources": {"chats": 2, "sums": 1}, "roles": {"tool": 1, "user": 2}}
    low, high = values["roles"]["user"]["acceptance_length_interval"]
    assert low - 1e-9 <= values["roles"]["user"]["acceptance_length"] <= high + 1e-9
    print_groups(values)
    printed = capsys.readouterr().out
    assert "from chats" in printed and "to tool" in printed and "turn 1" not in printed


def test_what_looks_like_markup_stands_in_tables_as_it_is(capsys):
    print_values({"[a]": "[/b] :x:"}, "[/c]")
    print_results(["[/d]"], [("decode", "[e]", "'[,]'", "[/f]")])
    printed = capsys.readouterr().out
    assert not [text for text in ("[a]", "[/b] :x:", "[/c]", "[/d]", "[e]", "'[,]'", "[/f]") if text not in printed]


@pytest.mark.parametrize("found", [(None, "vLLM is not installed"), ("0.9.0", "leaves vLLM 0.9.0 as it is")])
def test_against_a_vllm_that_cannot_serve_is_one_line_before_anything_is_read(monkeypatch, found):
    monkeypatch.setattr(vllm_engine, "installed_vllm", lambda: found)
    with pytest.raises(UserError, match=f"--against=vllm needs vLLM: .*{found[1]}") as caught:
        evaluate(Arguments(base_model="nowhere", speculator="nowhere", prompts="nowhere", against="vllm"))
    assert "\n" not in str(caught.value)


def test_an_evaluation_that_looks_up_first_sets_the_heads_own_chain_beside_vllm(place, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "w1 w2 w3 w1 w2 w3"}))
    asked, known = [], []

    def serve(base_model, speculator, lines, new_tokens, tokens, dtype):
        asked.append(tokens)
        return [[1] * new_tokens for _ in lines], {"acceptance_length": 1.0, "acceptance_per_position": [0.0] * tokens}

    def suggest(base_model, speculator, texts):
        known.extend(len(tokens) - prompt_length - new_tokens for _, tokens, prompt_length, new_tokens in texts)
        return []

    for name, stand_in in (("need_vllm", lambda _: None), ("installed_vllm", lambda: ("0.32.0", None)), ("serve", serve)):
        monkeypatch.setattr(f"pipelines.measure.evaluate.{name}", stand_in)
    monkeypatch.setattr("pipelines.measure.evaluate.suggest", suggest)
    words = dict(base_model=str(place / "base_model"), speculator=str(place / "speculator"), prompts=str(tmp_path / "prompts.jsonl"))
    shape = dict(lookup=10, min_probability=0.1, lookahead=2)
    evaluate(Arguments(**words, **shape, max_new_tokens=8, dtype="float32", against="vllm", out=str(tmp_path / "report.json")))
    report = json.loads((tmp_path / "report.json").read_text())
    assert asked == [report["against"]["num_speculative_tokens"]] == [2] and len(report["against"]["chain_acceptance_per_position"]) == 2
    assert (report["lookahead"], report["lookup"], report["min_probability"]) == (10, 10, 0.1)
    assert known == [10]  # tokens behind each text, as many as the deepest candidates that are compared


def test_a_benchmark_of_decoding_leaves_out_prompts_over_the_context_and_decodes_batches_of_all_others(place, capsys):
    loaded, speculator, _ = load_for_decoding(str(place / "base_model"), str(place / "speculator"), dtype="bfloat16", device="cpu")
    prompts = [Prompt(None, tokens) for tokens in prompts_of(8, 9, 10, 11, 250)]
    lines = list(benchmark_decode(loaded, speculator, prompts, prompts[-2:], 4))
    assert "warning: 2 of 7 prompts are over the context and left out" in capsys.readouterr().err
    batches = [line for line in lines if line["name"] == "batch"]
    assert [line["batch"] for line in batches] == [1, 2, 4, 8, 16]
    assert all(set(line["tokens_per_s"]) == {"plain", "speculator", "prompt_lookup"} for line in batches)
    assert {line["texts"]["equal"] + line["texts"]["parted"] for line in lines if line["name"] == "tree"} == {4}
    with pytest.raises(UserError, match="every prompt, the shortest of 250 tokens, is over the context"):
        next(benchmark_decode(loaded, speculator, prompts[-1:], [], 4))

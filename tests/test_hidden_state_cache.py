"""Hidden states that are kept in files: what is read again is what the base model gives, whatever happened to the files."""

import os
import shutil
import subprocess

import pytest
import torch

from fms_spec.base_model import BaseModel
from fms_spec.batch import Batch
from fms_spec.errors import UserError
from pipelines.train.state_cache import HiddenStates

ROWS, LENGTH = 6, 12


class Counted:
    """A base model that counts the rows it computes."""

    def __init__(self, base_model):
        self.base_model, self.rows = base_model, 0

    def __getattr__(self, name):
        return getattr(self.base_model, name)

    def hidden_states(self, tokens, segment_ids):
        self.rows += len(tokens)
        return self.base_model.hidden_states(tokens, segment_ids)


@pytest.fixture
def counted(base_model):
    return Counted(base_model)


@pytest.fixture
def opened(counted, tmp_path):
    """Opens the cache as a new process would: function of the base model, and of the place."""

    def opened(model=counted, place=tmp_path / "cache"):
        return HiddenStates(model, lambda states: model.logits(states).argmax(-1), place, ROWS, LENGTH, ROWS)

    return opened


def batch_of(rows, base_model, seed=0, padding=0):
    """Rows of random tokens, every other token the base model's own guess; the last `padding` places hold none."""
    tokens = torch.randint(0, base_model.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    states = base_model.base_model.hidden_states(tokens, torch.zeros_like(tokens))
    tokens[:, 6] = base_model.logits(states).argmax(-1)[:, 5]
    segment_ids = torch.zeros(len(rows), LENGTH, dtype=torch.int32)
    segment_ids[:, LENGTH - padding :] = -1
    return Batch(tokens[rows], segment_ids, torch.zeros(len(rows), dtype=torch.int64), torch.tensor(rows))


def check(cache, batch):
    """What the cache says of a batch is what the base model says without one."""
    (states, greedy), real = cache(batch), batch.segment_ids >= 0
    expected, expected_greedy = HiddenStates(cache.base_model.base_model, cache.best_tokens)(batch)
    torch.testing.assert_close(states[real], expected[real], rtol=1e-4, atol=1e-5)
    assert torch.equal(greedy[real], expected_greedy[real]) and greedy.any() and states.isfinite().all()


def test_a_second_pass_in_the_same_process_or_another_reads_what_the_first_one_kept(counted, opened, capsys):
    batch, cache = batch_of([0, 3, 5], counted), opened()
    for _ in range(2):
        check(cache, batch)
    check(opened(), batch)
    assert counted.rows == 3 and capsys.readouterr() == ("", "")


def test_a_row_is_read_again_in_a_batch_of_longer_rows(counted, opened):
    cache = opened()
    short = batch_of([1, 2], counted, padding=5)
    cut = Batch(short.tokens[:, :7], short.segment_ids[:, :7], short.first_states, short.row_ids)
    check(cache, cut)
    check(cache, short)
    check(opened(), short)
    assert counted.rows == 2


def flip(path, bit=0):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1 << bit
    path.write_bytes(content)


DAMAGES = {
    "deleted": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a bit flipped": flip,
    "overwritten": lambda path: path.write_bytes(b"\x01" * path.stat().st_size),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x" * 99),
}


@pytest.mark.parametrize("name", ["states", "greedy", "written"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_of_once_and_its_rows_are_computed_again(counted, opened, tmp_path, capsys, name, damage):
    batches = [batch_of(rows, counted) for rows in ([0, 1, 2], [3, 4, 5])]
    cache = opened()
    for batch in batches:
        check(cache, batch)
    DAMAGES[damage](tmp_path / f"cache/{name}.bin")
    computed, cache = counted.rows, opened()
    for batch in batches * 2:
        check(cache, batch)
    assert computed < counted.rows <= 2 * computed if damage != "longer" else counted.rows == computed
    told = capsys.readouterr().err.splitlines()
    assert len(told) == (0 if damage == "longer" or (name == "written" and damage in ("deleted", "emptied", "cut")) else 1)
    assert all("computed again" in line and str(tmp_path / "cache") in line for line in told)
    computed = counted.rows
    check(opened(), batches[0])
    assert counted.rows == computed


def test_a_row_of_other_tokens_under_the_same_number_is_computed_again(counted, opened):
    check(opened(), batch_of([0, 1], counted))
    check(opened(), batch_of([0, 1], counted, seed=1))
    assert counted.rows == 4


def test_a_cache_of_another_base_model_dtype_backend_or_other_layers_is_not_believed(counted, opened, model_dir, other_model_dir, capsys):
    batch = batch_of([0, 1], counted)
    check(opened(), batch)
    others = [
        BaseModel(str(other_model_dir), dtype="float32", device="cpu"),
        BaseModel(str(model_dir), dtype="bfloat16", device="cpu"),
        BaseModel(str(model_dir), dtype="float32", backend="transformers", device="cpu"),
        *(BaseModel(str(model_dir), dtype="float32", device="cpu") for _ in range(2)),
    ]
    others[-2].give_layers([0])
    others[-1].give_layers([1])
    for other in others:
        other = Counted(other)
        opened(other)(batch)
        assert other.rows == 2
    check(opened(other), batch)
    assert other.rows == 2 and capsys.readouterr().err.count("another base model, dtype or backend") == 5


def test_what_was_kept_without_checksums_is_not_believed(counted, opened, tmp_path, base_model):
    place = tmp_path / "cache"
    place.mkdir()
    (place / "states.bin").write_bytes(bytes(ROWS * LENGTH * base_model.width * 4))
    (place / "greedy.bin").write_bytes(bytes(ROWS * LENGTH))
    (place / "written.bin").write_bytes(b"\x01" * ROWS)
    check(opened(), batch_of([0, 5], counted))
    assert counted.rows == 2


def test_two_that_share_the_files_read_each_others_rows(counted, opened):
    one, two = opened(), opened()
    check(one, batch_of([0, 1], counted))
    check(two, batch_of([1, 2], counted))
    check(one, batch_of([2, 0], counted))
    assert counted.rows == 3


def test_files_take_room_for_the_rows_that_were_written(counted, tmp_path):
    cache = HiddenStates(counted, None, tmp_path / "cache", 100_000, LENGTH, 10)
    cache(batch_of([0, 5], counted))
    taken = sum(path.stat().st_blocks * 512 for path in (tmp_path / "cache").iterdir())
    assert taken < 1e6 < (tmp_path / "cache/states.bin").stat().st_size


@pytest.mark.parametrize("name", ["", "states.bin", "written.bin", "identity.json"])
def test_something_else_in_a_files_place_is_one_line_that_names_it(opened, tmp_path, name):
    place = tmp_path / "cache" / name
    if name:
        place.mkdir(parents=True)
    else:
        place.write_text("a file")
    with pytest.raises(UserError, match=f"{place}: cannot be written") as error:
        opened()
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounts a small disk")
def test_a_disk_that_fills_up_is_one_line_that_says_how_much_is_needed_and_nothing_is_lost(counted, opened, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20k", "none", disk], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        cache = opened(counted, disk / "cache")
        check(cache, batch_of([0, 1], counted))
        with pytest.raises(UserError, match=r"cache/states.bin: cannot be written \(No space left .* 9,216 bytes") as error:
            cache(batch_of([2, 3, 4, 5], counted))
        assert "\n" not in str(error.value)
        computed = counted.rows
        check(opened(counted, disk / "cache"), batch_of([0, 1], counted))
        assert counted.rows == computed
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # files are mapped still

"""Seeds of any size: in a run, in sampling, and at the many places that each draws its own numbers from one of them."""

import pytest
import torch

from fms_spec.decoding import decode
from fms_spec.options import DecodingOptions
from fms_spec.sampling import Sampling
from fms_spec.seeds import LARGEST, mixed
from pipelines.config import GenerationSection
from pipelines.generate.engines import EmbeddedEngine
from pipelines.train.run import train

SEEDS = [0, 1, 20261126, 2**40, LARGEST]


def test_places_of_small_seeds_keep_their_seeds_and_those_of_large_ones_are_told_apart():
    assert mixed(7) == 7 and mixed(LARGEST) == LARGEST
    assert mixed(3, 5, 2) == (3 * 1_000_003 + 5) * 1_000_003 + 2
    assert mixed(9_000_000, 2, 1) == (9_000_000 * 1_000_003 + 2) * 1_000_003 + 1
    found = [mixed(seed, step, place) for seed in (0, 2**32, 2**40, LARGEST - 1, LARGEST) for step in range(20) for place in range(20)]
    assert all(0 <= seed <= LARGEST for seed in found)
    assert len({seed % 2**32 for seed in found}) == len(found), "a CPU's generator looks at 32 bits"
    assert mixed(2**40, 1, 0) == 4531537966660619235


@pytest.mark.parametrize("seed", SEEDS)
def test_a_run_takes_any_seed_to_its_end(tmp_path, config_file, seed):
    trainer = train(config_file(seed=seed, **{"schedule.steps": 7, "validation.prompts": 0}), tmp_path / "run")
    assert trainer.step == 7


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_are_drawn_from_any_seed_each_row_its_own(base_model, seed):
    engine = EmbeddedEngine(GenerationSection(max_new_tokens=12, temperature=1.5, top_k=0), seed, base_model)
    engine.submit(0, torch.full((4, 3), 5))
    ((_, texts, _),) = engine.step()
    assert len({tuple(text.tolist()) for text in texts}) == 4
    options = DecodingOptions(max_new_tokens=12, sampling=Sampling(temperature=1.5), seeds=(mixed(seed, 0, 1),))
    (alone,), _ = decode(base_model, [torch.full((3,), 5)], options)
    assert alone.tokens == texts[1].tolist()

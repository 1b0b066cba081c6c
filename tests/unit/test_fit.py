"""What can be trained on, and what becomes of what cannot."""

import pytest

from infra.errors import InvalidRequestError
from infra.settings import Settings
from tests.unit.test_training_data import example
from trainer.config import RunConfig
from trainer.fit import check_shape, check_sides
from trainer.recipe import UnusableDataError
from trainer.snapshot import Snapshot


@pytest.mark.parametrize(
    ("examples", "code", "said"),
    [
        ([], "no_data", "counts"),
        ([example(f"{n}.", [1.0]) for n in range(9)], "one_sided_data", "All 9 answers are liked"),
        ([example(f"{n}.", [0.0, 0.25]) for n in range(9)], "one_sided_data", "are disliked"),
        ([example("So.", [1.0, 0.0])], "one_sided_data", "neither liked nor disliked"),
    ],
)
def test_data_with_one_side_is_not_trained_on(examples, code, said):
    with pytest.raises(UnusableDataError, match=said) as refused:
        check_sides(Snapshot(train=examples))
    assert refused.value.code == code


@pytest.mark.parametrize(
    "examples",
    [
        [example("Good.", [1.0]), example("Bad.", [0.0])],
        [example("Bad.", [0.0], fixed=["Good."])],
        [example("Good.", [1.0], over=["Bad."])],
    ],
)
def test_two_verdicts_a_correction_or_a_preference_are_two_sides(examples):
    check_sides(Snapshot(train=examples))


def test_an_adapter_has_the_shape_of_the_one_it_goes_on_from_and_fits_the_engine(tmp_path):
    settings = Settings(home=tmp_path)
    check_shape(RunConfig(), settings, None)
    check_shape(RunConfig(), settings, {"lora_rank": 16, "lora_alpha": 32})
    for config, before, said in (
        (RunConfig(lora_rank=settings.max_lora_rank + 1), None, "takes adapters of at most 16"),
        (RunConfig(lora_rank=8), {"lora_rank": 16, "lora_alpha": 32}, "lora_rank 16"),
        (RunConfig(), {"lora_rank": 16, "lora_alpha": 64}, "lora_alpha 64"),
    ):
        with pytest.raises(InvalidRequestError, match=said) as refused:
            check_shape(config, settings, before)
        assert refused.value.code == "adapter_shape"

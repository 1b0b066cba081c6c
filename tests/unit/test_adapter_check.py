"""What is taken as an adapter: plain LoRA of the present base model in safetensors, and nothing beside it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deploy.adapter_check import AdapterConfig, BaseShapes, check_adapter
from deploy.adapter_files import CONFIG, WEIGHTS, adapter_digest, check_directory, file_digests, is_digest
from deploy.names import check_name
from infra.errors import EverloopError, IntegrityError, InvalidRequestError
from tests.adapters import make_adapter, make_base, tensors

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return BaseShapes.read(make_base(tmp_path_factory.mktemp("base") / "model"))


def refusal(directory, base, max_rank=16):
    with pytest.raises(IntegrityError) as refused:
        check_directory(directory)
        check_adapter(directory, base, max_rank)
    return refused.value.code


def test_an_adapter_as_peft_saves_it_is_taken(tmp_path, base):
    make_adapter(tmp_path)
    (tmp_path / "README.md").write_text("A card.")
    check_directory(tmp_path)
    check_adapter(tmp_path, base, max_rank=4)


@pytest.mark.parametrize(
    "name",
    [
        *("adapter_model.bin", "adapter_model.pt", "training_args.bin", "optimizer.pth", "data.pkl", "x.pickle"),
        *("new_embeddings.safetensors", "model.safetensors", "adapter_model.tensors", "modeling.py", "x.so"),
        *("x.ckpt", "x.npy", "x", ".hidden", "X.BIN"),
    ],
)
def test_what_could_be_loaded_or_run_in_its_place_is_refused(tmp_path, base, name):
    (make_adapter(tmp_path) / name).write_bytes(b"")
    assert refusal(tmp_path, base) == "adapter_unsafe"


def test_links_and_directories_are_refused(tmp_path, base):
    source = make_adapter(tmp_path / "source")
    for name in (CONFIG, WEIGHTS, "README.md"):
        linked = make_adapter(tmp_path / f"linked-{name}")
        (linked / name).unlink(missing_ok=True)
        (linked / name).symlink_to(source / CONFIG)
        assert refusal(linked, base) == "adapter_unsafe"
    (tmp_path / "link").symlink_to(source)
    assert refusal(tmp_path / "link", base) == "adapter_unsafe"
    assert refusal(tmp_path / "nothing", base) == "adapter_incomplete"
    (source / "default").mkdir()
    assert refusal(source, base) == "adapter_unsafe"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_told(tmp_path, base, name):
    (make_adapter(tmp_path) / name).unlink()
    assert refusal(tmp_path, base) == "adapter_incomplete"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"r": 17}, "adapter_rank_too_large"),
        ({"rank_pattern": {"q_proj": 17}}, "adapter_rank_too_large"),
        ({"r": 0}, "adapter_config_invalid"),
        ({"r": True}, "adapter_config_invalid"),
        ({"r": "4"}, "adapter_config_invalid"),
        ({"rank_pattern": {"q_proj": 0}}, "adapter_config_invalid"),
        ({"peft_type": "PROMPT_TUNING"}, "adapter_config_invalid"),
        ({"task_type": "SEQ_CLS"}, "adapter_config_invalid"),
        ({"bias": "all"}, "adapter_config_invalid"),
        ({"init_lora_weights": "pissa"}, "adapter_config_invalid"),
        ({"lora_alpha": float("nan")}, "adapter_config_invalid"),
        ({"target_modules": ".*(a+)+$"}, "adapter_config_invalid"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "evil"}}, "adapter_unsafe"),
        ({"modules_to_save": ["lm_head"]}, "adapter_unsupported"),
        ({"use_dora": True}, "adapter_unsupported"),
        ({"lora_bias": True}, "adapter_unsupported"),
        ({"layer_replication": [[0, 2]]}, "adapter_unsupported"),
        ({"alora_invocation_tokens": [1]}, "adapter_unsupported"),
        ({"trainable_token_indices": [1]}, "adapter_unsupported"),
        ({"megatron_config": {"x": 1}}, "adapter_unsupported"),
        ({"a_variant_of_next_year": {"x": 1}}, "adapter_unsupported"),
        ({"rank_pattern": {"(q_)+proj": 4}}, "adapter_unsupported"),
        # The two files are of different adapters:
        ({"r": 8}, "adapter_config_invalid"),
        ({"rank_pattern": {"self_attn.q_proj": 2}}, "adapter_config_invalid"),
        ({"target_modules": ["q_proj"]}, "adapter_config_invalid"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(tmp_path, base, config, code):
    assert refusal(make_adapter(tmp_path, **config), base) == code


def test_a_configuration_that_is_none_is_refused(tmp_path, base):
    for text in ("", "[]", "{", "null", "{}", "\x00", '{"peft_type": "LORA"' + " " * 2**20 + "}"):
        (make_adapter(tmp_path) / CONFIG).write_text(text)
        assert refusal(tmp_path, base) == "adapter_config_invalid"


def test_ranks_per_module_are_read_as_the_engine_does(tmp_path, base):
    weights = tensors()
    for name in list(weights):
        if "q_proj" in name:
            part = weights[name]
            weights[name] = np.ascontiguousarray(part[:2] if "lora_A" in name else part[:, :2])
    check_adapter(make_adapter(tmp_path, weights=weights, rank_pattern={"self_attn.q_proj": 2}), base, 4)
    config = AdapterConfig(peft_type="LORA", r=4, lora_alpha=8, rank_pattern={"q_proj": 2, "gate_up_proj": 3})
    assert config.rank_of("model.layers.0.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.0.self_attn.my_q_proj") == 4
    assert config.rank_of("model.layers.0.mlp.experts.base_layer") == 3
    assert config.rank_of("model.layers.0.mlp.experts") == 4


def test_fused_experts_are_read_as_peft_writes_them(tmp_path, base):
    """As of a Qwen3-MoE with 4 experts: gate and up are one parameter, of twice the rank."""
    experts = "base_model.model.model.layers.0.mlp.experts"
    shapes = {
        f"{experts}.base_layer.lora_A.weight": (32, 8),
        f"{experts}.base_layer.lora_B.weight": (24, 32),
        f"{experts}.lora_A.weight": (16, 12),
        f"{experts}.lora_B.weight": (8, 16),
    }
    config = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "v_proj.weight"]}
    config["rank_pattern"] = {".*\\.gate_up_proj": 8}
    weights = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    weights |= {name: weight for name, weight in tensors().items() if "v_proj" in name}
    check_adapter(make_adapter(tmp_path, weights=weights, **config), base, 8)
    assert refusal(tmp_path, base, max_rank=4) == "adapter_rank_too_large"
    weights[f"{experts}.lora_B.weight"] = np.zeros((100, 16), np.float32)
    assert refusal(make_adapter(tmp_path, weights=weights, **config), base) == "adapter_of_another_base"
    weights[f"{experts}.lora_B.weight"] = np.zeros((8, 18), np.float32)
    weights[f"{experts}.lora_A.weight"] = np.zeros((18, 12), np.float32)
    assert refusal(make_adapter(tmp_path, weights=weights, **config), base) == "adapter_config_invalid"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda w: w.pop(B), "adapter_incomplete"),
        (lambda w: w.clear(), "adapter_incomplete"),
        (lambda w: w.update({"x": np.zeros((4, 8), np.float32)}), "adapter_unsupported"),
        (lambda w: w.update({A.replace("lora_A", "lora_embedding_A"): w.pop(A)}), "adapter_unsupported"),
        (lambda w: w.update({A.replace("lora_A", "lora_A.default"): w.pop(A)}), "adapter_unsupported"),
        (lambda w: w.update({A: w[A].astype(np.int8)}), "adapter_unsupported"),
        (lambda w: w.update({A: w[A][None]}), "adapter_unsupported"),
        (lambda w: w.update({A: np.zeros((4, 16), np.float32)}), "adapter_of_another_base"),
        (lambda w: w.update({B: np.zeros((16, 4), np.float32)}), "adapter_of_another_base"),
        (lambda w: w.update({k.replace(".0.", ".7."): w.pop(k) for k in (A, B)}), "adapter_of_another_base"),
        (lambda w: w[A].__setitem__((0, 0), np.nan), "adapter_not_finite"),
        (lambda w: w[B].__setitem__((0, 0), -np.inf), "adapter_not_finite"),
        (
            lambda w: w.update({A: w[A].astype(np.float16), B: np.full((8, 4), np.inf, np.float16)}),
            "adapter_not_finite",
        ),
    ],
)
def test_weights_that_cannot_be_served_are_refused(tmp_path, base, change, code):
    weights = tensors()
    change(weights)
    assert refusal(make_adapter(tmp_path, weights=weights), base) == code


def test_an_adapter_of_a_wider_base_is_refused(tmp_path, base):
    adapter = make_adapter(tmp_path / "adapter")
    check_adapter(adapter, base, 4)
    assert refusal(adapter, BaseShapes.read(make_base(tmp_path / "wide", hidden=16))) == "adapter_of_another_base"


def test_names_before_the_layers_do_not_matter_and_bfloat16_is_read(tmp_path, base):
    """A transformers that wraps a language model names it otherwise; numpy has no bfloat16, so this is by hand."""
    weights = {name.replace("model.model.", "model.model.language_model."): w for name, w in tensors().items()}
    path = make_adapter(tmp_path, weights={k: w.astype(np.float16) for k, w in weights.items()}) / WEIGHTS
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header, data = whole[8 : 8 + size].replace(b'"F16"', b'"BF16"'), bytearray(len(whole) - 8 - size)
    header = header.rstrip()
    header += b" " * (-len(header) % 8)
    for value, code in (
        (b"\x80\x3f", None),
        (b"\x80\x7f", "adapter_not_finite"),
        (b"\xc0\xff", "adapter_not_finite"),
    ):
        data[-2:] = value
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
        if code is None:
            check_adapter(tmp_path, base, 4)
        else:
            assert refusal(tmp_path, base) == code


@given(st.binary(max_size=400), st.integers(0, 400))
def test_no_bytes_make_the_check_fail_otherwise_than_it_says(base, tmp_path_factory, noise, at):
    directory = make_adapter(tmp_path_factory.mktemp("noise"))
    path = directory / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + noise + whole[at + len(noise) :])
    try:
        check_adapter(directory, base, 4)
    except EverloopError as error:
        assert error.code.startswith("adapter_")


def test_a_digest_names_files_and_a_change_of_either_is_another(tmp_path):
    first = adapter_digest(file_digests(make_adapter(tmp_path / "a")))
    assert first == adapter_digest(file_digests(make_adapter(tmp_path / "b"))) and is_digest(first)
    assert first != adapter_digest(file_digests(make_adapter(tmp_path / "c", lora_alpha=9)))
    assert first != adapter_digest(file_digests(make_adapter(tmp_path / "d", seed=1)))


@given(st.text(max_size=70))
def test_only_digests_are_digests(text):
    assert is_digest(text) == (len(text) == 64 and set(text) <= set("0123456789abcdef"))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *((name, "name_protected") for name in ("champion", "challenger", "base", "everloop", "Champion", "BASE")),
        *((name, "name_protected") for name in ("run/abc@3", "run/", "r1-1a2b3c4d", "R12-x")),
        *((name, "name_invalid") for name in ("", "a b", "../x", "-x", "x/y", "x" * 65, "Größe", "x\n", "A")),
    ],
)
def test_names_that_mean_something_else_are_protected(name, code):
    with pytest.raises(InvalidRequestError) as refused:
        check_name(name)
    assert refused.value.code == code


def test_other_names_are_taken():
    for name in ("terse-2026.11", "r", "rune", "base-2", "champion_of_may"):
        check_name(name)


def test_the_base_models_shapes_come_from_every_file(tmp_path):
    directory = make_base(tmp_path / "model")
    save_file({"lm_head.weight": np.zeros((16, 8), np.float32)}, directory / "model-2.safetensors")
    base = BaseShapes.read(directory)
    assert base.fits("lm_head", 8, 16, transposed=False) and not base.fits("lm_head", 16, 8, transposed=False)
    assert base.fits("lm_head", 16, 8, transposed=True), "a Conv1D stores its weights the other way round"
    assert json.dumps(sorted(base.weights["layers.0.mlp.down_proj"])) == "[[8, 12]]"

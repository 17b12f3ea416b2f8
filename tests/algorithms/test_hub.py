"""Published checkpoints without their library: configs, names of tensors, and what is refused."""

import sys
import weakref

import pytest
import torch

from harness import checkpoint, export, hub
from harness.errors import InputError
from hub_models import FAKE, FAMILIES, load_file, tensors_of, write_model
from llama import CLOSE
from model import GPT, GPTConfig, rotary_angles
from written_out import reference_llama


@pytest.fixture
def library(monkeypatch):
    """What stands for safetensors."""
    monkeypatch.setattr(hub, "safetensors", lambda: FAKE)
    return FAKE.torch.save_file


def load(folder):
    return checkpoint.build_model(checkpoint.read(str(folder)))


# -- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_is_taken_over(family):
    """Every number of the config is in the model, biases and norms are the family's, and what is
    written back says the same."""
    config, _ = FAMILIES[family]
    found = GPTConfig(**hub.model_config(config))
    assert (found.vocab_size, found.block_size, found.n_layer, found.n_head, found.n_kv_head,
            found.n_embd, found.n_hidden, found.norm_eps) == (352, 256, 2, 4, 2, 32, 48, 1e-5)
    assert found.head_dim == config.get("head_dim", 8)
    assert found.rope_theta == config["rope_theta"]
    assert found.qkv_bias == (config["model_type"] == "qwen2")
    assert found.qk_norm == (config["model_type"] == "qwen3")
    assert found.tie_embeddings == config["tie_word_embeddings"]
    assert hub.model_config(export.published_config(GPT(found))) == hub.model_config(config)


LLAMA, QWEN = FAMILIES["llama3"][0], FAMILIES["qwen2"][0]


@pytest.mark.parametrize("config, changes, named", [
    (LLAMA, {"model_type": "gemma2"}, "model_type gemma2"),
    (LLAMA, {"model_type": "qwen3_moe"}, "model_type qwen3_moe"),
    (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu"),
    (LLAMA, {"attention_bias": True}, "attention_bias True"),
    (LLAMA, {"mlp_bias": True}, "mlp_bias True"),
    (LLAMA, {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
    (LLAMA, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "dynamic"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    (LLAMA, {"rope_interleaved": True}, "rope_interleaved"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config"),
    (LLAMA, {"sliding_window": 64}, "sliding_window 64"),
    (dict(LLAMA, model_type="mistral"), {"sliding_window": 128}, "sliding_window 128"),
    (QWEN, {"use_sliding_window": True}, "use_sliding_window"),
    (QWEN, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    (LLAMA, {"residual_multiplier": 0.2}, "residual_multiplier is not known"),
    (LLAMA, {"vocab_size": None}, "vocab_size is missing"),
])
def test_a_config_that_means_something_else_is_refused_by_name(config, changes, named):
    """Another architecture, and every setting that model.py does not compute."""
    with pytest.raises(InputError, match=named):
        hub.model_config({**config, **changes})


def test_a_window_as_long_as_the_context_is_none():
    """Mistral's window beyond its context, and Qwen's that is not in use, change nothing."""
    for config, window in ((dict(LLAMA, model_type="mistral"), 256), (QWEN, 4)):
        assert hub.model_config({**config, "sliding_window": window}) == hub.model_config(config)


def test_rope_parameters_are_rope_theta_and_rope_scaling():
    """Newer configs have one object in the place of two keys."""
    config, _ = FAMILIES["llama3.2"]
    newer = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
    newer["rope_parameters"] = {**config["rope_scaling"], "rope_theta": config["rope_theta"]}
    assert hub.model_config(newer) == hub.model_config(config)


def test_llama_3_stretches_long_wavelengths_alone():
    """Factor 8, original context 64, factors 1 and 4: a wavelength below 16 stays, one above 64
    becomes 8 times as long, and between the two lies a mixture, by how often it turns in 64."""
    config = GPTConfig(**hub.model_config(FAMILIES["llama3.2"][0]))
    plain = GPTConfig(**{**vars(config), "rope_scaling": None})
    (cos, sin), (cos0, sin0) = rotary_angles(config), rotary_angles(plain)
    angle, angle0 = (torch.atan2(s[1], c[1]) for c, s in ((cos, sin), (cos0, sin0)))  # at place 1
    wavelength = 2 * torch.pi / angle0
    assert (wavelength < 16).any() and (wavelength > 64).any()
    for length, old, new in zip(wavelength.tolist(), angle0.tolist(), angle.tolist()):
        kept = min(max((64 / length - 1) / (4 - 1), 0), 1)
        assert new == pytest.approx(old * (kept + (1 - kept) / 8), rel=1e-5)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_published_model_is_llama_written_out(tmp_path, library, family):
    """Read from its folder, in one file or in three, the model equals the plain transcription of
    its block (those with scaled wavelengths are compared with transformers)."""
    model = load(write_model(tmp_path / "one", family, library))
    sharded = load(write_model(tmp_path / "three", family, library, shards=3))
    tokens = [7, 1, 200, 0, 351, 351, 8]
    logits = model(torch.tensor([tokens]))[0].detach()
    torch.testing.assert_close(sharded(torch.tensor([tokens]))[0].detach(), logits, **CLOSE)
    if not model.config.rope_scaling:
        torch.testing.assert_close(logits, reference_llama(model, tokens), **CLOSE)
    assert model.dtype == torch.float32 and all(p.requires_grad for p in model.parameters())
    tied = model.config.tie_embeddings
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_weights_of_half_precision_become_float32(tmp_path, library):
    """bfloat16 as it is published; training goes on in float32."""
    def save(tensors, path, metadata):
        library({name: t.bfloat16() for name, t in tensors.items()}, path, metadata)
    model = load(write_model(tmp_path, "qwen3", save))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = tensors_of(FAMILIES["qwen3"][0])["model.norm.weight"].bfloat16().float()
    assert torch.equal(model.norm.weight.detach(), expected)


def test_one_tensor_is_held_at_a_time():
    """When the next tensor is asked for, the one before has been let go."""
    seen = []

    def tensors():
        for name, tensor in tensors_of(LLAMA).items():
            assert not seen or seen.pop()() is None
            pair = [(name, tensor.clone())]
            seen.append(weakref.ref(pair[0][1]))
            yield pair.pop()
    model = hub.build(hub.model_config(LLAMA), tensors)
    assert model.num_parameters() == sum(t.numel() for t in tensors_of(LLAMA).values())


@pytest.mark.parametrize("change, named", [
    (lambda t: t.pop("model.norm.weight"), "lack norm.weight"),
    (lambda t: t.update(extra=torch.ones(1)), "hold extra"),
    (lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(32)}), "o_proj.bias"),
    (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm.weight as .*\(3,\)"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32).long()}), "norm.weight as torch.int"),
])
def test_weights_that_are_not_the_configs_are_refused(change, named):
    """One too few, one too many, another shape, another kind."""
    tensors = tensors_of(LLAMA)
    change(tensors)
    with pytest.raises(InputError, match=named):
        hub.build(hub.model_config(LLAMA), tensors.items)


def test_a_head_beside_tied_embeddings_is_not_read():
    """Some files hold a tied head as well; old Llamas hold the frequencies."""
    tensors = tensors_of(QWEN)
    extra = {"lm_head.weight": torch.zeros(352, 32),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = hub.build(hub.model_config(QWEN), {**tensors, **extra}.items)
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_nan_is_refused():
    """As with a checkpoint of ours."""
    tensors = tensors_of(LLAMA)
    tensors["model.norm.weight"][3] = torch.nan
    with pytest.raises(InputError, match="not all finite"):
        checkpoint.build_model({"model": tensors.items, "model_config": hub.model_config(LLAMA)})


# -- folders --------------------------------------------------------------------------------------


def test_without_the_library_one_line_names_it(tmp_path, monkeypatch):
    """And not before weights are needed: the shape can be told without."""
    folder = write_model(tmp_path, "llama3", FAKE.torch.save_file)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert checkpoint.build_model(checkpoint.read(str(folder)), "meta").config.n_embd == 32
    with pytest.raises(InputError, match="pip install safetensors"):
        load(folder)


def test_a_folder_that_lacks_something(tmp_path, library):
    """No weights, weights that are none, a config that is no JSON, no config at all."""
    folder = write_model(tmp_path / "a", "llama3", library)
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(InputError, match="model.safetensors: not a safetensors file"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors: there are no weights there"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json: not JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="no checkpoint there"):
        load(folder)


# -- back again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_what_was_read(tmp_path, library, family):
    """Config, weights and tokenizer come back; what was not computed from the config, as the name
    of the family, stays."""
    folder = write_model(tmp_path / "a", family, library)
    export.export(load(folder), str(folder), str(tmp_path / "b"))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    before, after = (hub.read_json(str(tmp_path / name), "config.json") for name in "ab")
    assert before == after
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_text() == (folder / name).read_text()


def test_a_model_of_ours_is_exported_as_one_of_the_families(tmp_path, library):
    """Our default has Qwen3's shape; without qk_norm it is a Llama. Both are read again."""
    for norm, family in ((True, "qwen3"), (False, "llama")):
        model = GPT(GPTConfig(n_embd=16, n_layer=1, n_head=2, qk_norm=norm))
        export.export(model, None, str(tmp_path / family), torch.float32)
        assert hub.read_json(str(tmp_path / family), "config.json")["model_type"] == family
        ids = torch.tensor([[1, 2, 3]])
        assert torch.equal(load(tmp_path / family)(ids), model(ids))


def test_what_cannot_be_exported(tmp_path, library):
    """A folder that holds something, a reward model, a bias beside a norm."""
    model = GPT(GPTConfig(n_embd=16, n_layer=1, n_head=2))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    with pytest.raises(InputError, match="not empty"):
        export.export(model, None, str(tmp_path / "full"))
    with pytest.raises(InputError, match="a reward model"):
        export.export(model.with_scalar_head(), None, str(tmp_path / "new"))
    both = GPT(GPTConfig(n_embd=16, n_layer=1, n_head=2, qkv_bias=True))
    with pytest.raises(InputError, match="qkv_bias with qk_norm"):
        export.export(both, None, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()

"""Models as transformers writes them, imported: the same logits and ids, evaluated, sampled from, exported again."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from texts import kvf, refused, write_texts
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV32Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from train.hf_tokenizer import HFTokenizer
from train.trained import load

SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "initializer_range": 0.2,
}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "rms_norm_eps": 1e-3}
LATENT = {
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 6,
    "qk_nope_head_dim": 8,
    "v_head_dim": 10,
    "first_k_dense_replace": 2,
}
CONFIGS = {
    "mha": LlamaConfig(**SIZES),
    "gqa": LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=12, rope_theta=500.0, tie_word_embeddings=True),
    "mqa": MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=None),
    "normed": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "mla": DeepseekV3Config(**SIZES, **LATENT, q_lora_rank=None),
    "mla-q": DeepseekV3Config(**SIZES, **LATENT, q_lora_rank=12, tie_word_embeddings=True),
    "dsa": DeepseekV32Config(**SIZES, **LATENT, q_lora_rank=12, index_n_heads=8, index_head_dim=12, index_topk=9),
}
TEXT = "def f(x_1):\n    return [1234567, 'caf\xe9 \u4e2d', \"  \"]  # the <|endoftext|> fox </s>\n"
ARGUMENTS = "--set", "corpus={files: [texts/*.txt]}", "--set", "train.val_tokens=128"


def bytes_tokenizer():
    """As GPT-2's and Llama 3's, but with special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"initial_alphabet": alphabet, "special_tokens": ["<|endoftext|>", "<|pad|>"], "show_progress": False}
    tokenizer.train_from_iterator(["the quick brown fox " * 9], trainers.BpeTrainer(vocab_size=290, **how))
    return tokenizer, {"eos_token": "<|endoftext|>"}


def sentencepiece_tokenizer():
    """As Llama 2's: a text begins with <s>, a blank is an underline, bytes stand for characters without a token."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581thequickbrownfx"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    vocabulary = {word: n for n, word in enumerate(dict.fromkeys([*words, *(a + b for a, b in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"eos_token": "</s>", "bos_token": "<s>"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with texts, and in hf/ a directory of each model."""
    folder = tmp_path_factory.mktemp("import")
    write_texts(folder)
    for n, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(n)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # as trained ones: norms begin at one
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter) * (parameter.dim() == 1)
        model.save_pretrained(folder / "hf" / name)
        tokenizer, special = (sentencepiece_tokenizer if n % 2 else bytes_tokenizer)()
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "hf" / name)
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVFRONTIER_CACHE", str(folder / "cache"))
    return folder


def imported(name):
    """The directory of the run of a model, imported once."""
    run = f"out/{name}/runs/{name}/seed-0"
    try:
        return run, load(run)
    except Exception:
        assert kvf("import", f"hf/{name}", f"out/{name}", *ARGUMENTS) == 0
        return run, load(run)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same_and_so_are_those_of_an_export(here, name, tmp_path):
    _, run = imported(name)
    theirs = AutoModelForCausalLM.from_pretrained(here / "hf" / name).eval()
    assert run.model.count_params() == sum(p.numel() for p in theirs.parameters())
    tokens = torch.randint(300, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (run.model(tokens) - expected).abs().max() <= 2e-5 * expected.abs().max()
        cache = run.model.new_cache(2, 60)
        run.model.prefill(tokens[:, :50], cache)
        for t in range(50, 60):
            logits = run.model.decode(tokens[:, t], cache)
            assert (logits - expected[:, t]).abs().max() <= 2e-5 * expected.abs().max()
    assert kvf("export", f"out/{name}/runs/{name}/seed-0", tmp_path / "again") == 0
    one, other = (load_file(path / "model.safetensors") for path in (here / "hf" / name, tmp_path / "again"))
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (here / "hf" / name / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_ids_are_the_same_and_stand_for_the_same_bytes(here, name):
    _, trained = imported(name)
    ours, theirs = trained.tokenizer, PreTrainedTokenizerFast.from_pretrained(here / "hf" / name)
    for text in (
        "",
        "a",
        "the quick  brown\n\n fox 1234",
        *("".join(map(chr, range(n, n + 50))) for n in range(0, 900, 50)),
    ):
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode_ordinary(text) == ids
        pieces = ours.encode_to_numpy(text, disallowed_special=()).tolist()  # no blank is put before it
        assert ours.decode(pieces) == text == theirs.decode(ids)
        assert sum(len(ours.tokens[token]) for token in pieces) == len(text.encode())
        assert [*trained.prefix, *ids] == theirs(text)["input_ids"]
    assert ours.decode(ours.encode_ordinary(TEXT)).removeprefix(" ") == TEXT  # what looks like a special token is text
    assert ours.eot_token not in ours.encode_ordinary(TEXT)
    assert ours.decode([ours.eot_token]) == ("</s>" if name == "gqa" else "<|endoftext|>")
    assert ours.eot_token in ours.encode("a</s><|endoftext|>", allowed_special="all")


def test_eval_sample_and_techniques_take_it(here, capsys):
    run, _ = imported("gqa")
    techniques = "[{technique: h2o, budget: 0.5}, {technique: full, bits: 8, residual: 4}]"
    settings = {
        "eval.loss_tokens": 128,
        "eval.decode": "{batch: [1], context: [16]}",
        "eval.technique_tokens": 128,
        "eval.techniques": techniques,
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    assert kvf("run", "out/gqa", *ARGUMENTS, *changes) == 0
    results = json.loads((here / "out/gqa/results.json").read_text())
    (record,) = results["runs"]
    theirs = AutoModelForCausalLM.from_pretrained(here / "hf/gqa").eval()
    assert record["weights"]["folder"] == "gqa"
    assert (record["train_tokens"], len(record["curve"])) == (0, 1)
    assert 0.5 < record["curve"][0]["val_nats"] / math.log(300) < 3
    assert record["kv"]["bytes_per_token"] == 2 * 2 * 12 * 2 * 4 == 2 * record["options"]["kv_heads"] * 12 * 2 * 4
    assert theirs.config.num_key_value_heads == record["options"]["kv_heads"]
    capsys.readouterr()
    assert kvf("sample", run, "--prompt", "the fox", "--temperature", 0, "--tokens", 8) == 0
    tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "hf/gqa")
    ids = tokenizer("the fox", return_tensors="pt")["input_ids"]
    made = theirs.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    continued = b"".join(load(run).tokenizer.decode_single_token_bytes(t) for t in made[0, ids.shape[1] :].tolist())
    assert capsys.readouterr().out == f"the fox{continued.decode('utf-8', 'replace')}\n"
    assert kvf("import", "hf/gqa", "out/gqa", *ARGUMENTS) == 0  # the same command again


def test_two_models_with_one_tokenizer_in_a_study(here, tmp_path):
    study = yaml.safe_load((here / "out/mha/study.yaml").read_text()) if imported("mha") else None
    other = yaml.safe_load((here / "out/mqa/study.yaml").read_text()) if imported("mqa") else None
    assert study["tokenizer"] == other["tokenizer"]
    both = study | {"variants": study["variants"] + other["variants"], "corpus": {"files": [str(here / "texts/*.txt")]}}
    both["tokenizer"]["name"] = str(here / "hf/mha/tokenizer.json")
    both["train"] |= {"lr": [1e-3, 2e-3], "val_tokens": 128}
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(both))
    assert kvf("train", tmp_path / "both.yaml", "--out", tmp_path / "out") == 0
    for name in ("mha", "mqa"):
        one, two = imported(name)[1].model, load(tmp_path / "out/runs" / name / "seed-0").model
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' cannot be imported; those that can be: llama, mistral,"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling='llama3': no architecture here computes that"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': no architecture here computes that"),
        ({"sliding_window": 32}, "sliding_window=32: no architecture here computes that"),
        (
            {"intermediate_size": 40},
            "the weight model.layers.0.mlp.gate_proj.weight is of shape [48, 32], not [40, 32]",
        ),
        ({"num_hidden_layers": 1}, "no architecture here has the weight model.layers.1."),
        ({"hidden_size": None}, "has no 'hidden_size'"),
        ({"max_position_embeddings": "many"}, "config.json has a value of a wrong type: "),
        ({"rope_scaling": "linear", "rope_parameters": None}, "rope_scaling='linear': must be a mapping"),
        ({"num_key_value_heads": 3}, "kv_heads=3 must divide heads=4: no architecture here computes that"),
    ],
)
def test_what_cannot_be_imported_is_one_line(here, tmp_path, capsys, change, message):
    config = json.loads((here / "hf/mha/config.json").read_text()) | change
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(here / "hf/mha" / file)
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    assert message in refused(capsys, "import", tmp_path, tmp_path / "out", *ARGUMENTS)


def test_files_that_are_missing_or_strange_are_one_line(here, tmp_path, capsys):
    assert "has no config.json of a model" in refused(capsys, "import", "texts", tmp_path / "out")
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((here / "hf/mha" / name).read_bytes())
    assert "has no tokenizer.json" in refused(capsys, "import", tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a tokenizer.json that" in refused(capsys, "import", tmp_path, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_bytes((here / "hf/mha/tokenizer.json").read_bytes())
    assert "has no weights as .safetensors" in refused(capsys, "import", tmp_path, tmp_path / "out")
    weights = load_file(here / "hf/mha/model.safetensors")
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, tmp_path / "model.safetensors")
    line = refused(capsys, "import", tmp_path, tmp_path / "out", *ARGUMENTS)
    assert "no architecture here has the weight model.layers.0.self_attn.q_proj.bias" in line
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    assert "cannot be read" in refused(capsys, "import", tmp_path, tmp_path / "new", *ARGUMENTS)
    assert "hf/mha is there already" in refused(capsys, "import", "hf/gqa", "hf/mha")


def test_weights_in_several_files_and_in_bf16(here, tmp_path):
    weights = {name: w.bfloat16() for name, w in load_file(here / "hf/mla/model.safetensors").items()}
    names = sorted(weights)
    for n in range(2):
        save_file({name: weights[name] for name in names[n::2]}, tmp_path / f"model-0000{n + 1}-of-00002.safetensors")
    places = {name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((here / "hf/mla" / file).read_bytes())
    assert kvf("import", tmp_path, tmp_path / "out", *ARGUMENTS) == 0
    (run,) = (tmp_path / "out/runs").glob("*/seed-0")
    ours, theirs = load(run).model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert np.allclose(ours(tokens), theirs(tokens).logits, atol=1e-4)


def test_what_a_study_says_of_imported_weights_must_be_so(here, tmp_path, capsys):
    imported("normed")
    study = yaml.safe_load((here / "out/normed/study.yaml").read_text())
    study |= {"corpus": {"files": [str(here / "texts/*.txt")]}}
    study["tokenizer"]["name"] = str(here / "out/normed/tokenizer.json")
    (entry,) = study["variants"]
    for change, message in (
        ({"rope_base": 5e5}, "rope_base=500000.0: its weights are those of a model with rope_base: 10000.0"),
        ({"lr": 1e-3}, "lr: a model with weights of its own is not trained; leave it out"),
        ({"gate": True}, "gate=True: its weights are those of a model with gate: False"),
        ({"arch": "mqa"}, "its weights are those of arch: gqa, not mqa"),
        ({"weights": "nowhere"}, "weights: there is no directory nowhere"),
    ):
        changed = {
            key: value for key, value in (entry | change).items() if key != "kv_heads" or change.get("arch") is None
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"variants": [changed]}))
        assert message in refused(capsys, "train", tmp_path / "study.yaml", "--out", tmp_path / "out")


def test_a_file_that_another_program_wants_is_not_read_and_the_end_of_a_text_is_found(here, tmp_path):
    """Mistral's directories have the weights twice; older ones name the end in special_tokens_map.json."""
    for file in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / file).write_bytes((here / "hf/gqa" / file).read_bytes())
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert kvf("import", tmp_path, tmp_path / "out", *ARGUMENTS) == 0
    study = yaml.safe_load((tmp_path / "out/study.yaml").read_text())
    assert study["tokenizer"]["end_of_text"] == "</s>"
    folders = set((here / "cache").glob("tokens-*"))
    assert kvf("import", tmp_path, tmp_path / "out", *ARGUMENTS) == 0
    assert set((here / "cache").glob("tokens-*")) == folders


def test_a_tokenizer_of_words_is_refused(tmp_path):
    words = Tokenizer(models.WordLevel({"a": 0, "<|endoftext|>": 1}, "<|endoftext|>"))
    words.add_special_tokens(["<|endoftext|>"])
    with pytest.raises(Exception, match="spelled neither by bytes"):
        HFTokenizer(words.to_str().encode(), None, "<|endoftext|>")

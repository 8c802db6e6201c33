"""A tiny target with a word-level tokenizer and a chat template, on disk as any Hugging Face model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from redrafter.backends.torch.drafter import Drafter, DrafterConfig
from redrafter.files import sha256
from redrafter.train.samples import ShardWriter, write_manifest
from redrafter.train.target import TrainingTarget
from redrafter.train.writing import Writer, WritingConfig

WORDS = 60
TEMPLATE = (
    "<s> w0 w1 <e> {% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} <e> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    names = ["<e>", "<s>", "user", "assistant", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", bos_token="<s>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(names),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=0,
        bos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def target(model_folder: Path) -> TrainingTarget:
    return TrainingTarget.load(model_folder, "cpu", torch.float32, (0, 2))


@pytest.fixture
def tiny_drafter() -> Drafter:
    torch.manual_seed(3)
    drafter = Drafter(
        DrafterConfig(
            vocab_size=64,
            hidden_size=32,
            num_target_layers=4,
            feature_layers=(0, 2),
            cell="gru",
            head="tied",
            exit_dim=32,
            num_blocks=1,
            trunk_layers=1,
            trunk_heads=4,
            trunk_kv_heads=2,
            draft_vocabulary=40,
            draft_length=4,
        )
    )
    drafter.token_ids.copy_(torch.randperm(64)[:40])
    return drafter.requires_grad_(True)


@pytest.fixture(scope="session")
def data(target: TrainingTarget, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy texts from a few starts: short, repetitive, learnable in seconds."""
    folder = tmp_path_factory.mktemp("data")
    shard = ShardWriter(64)
    prompts = [np.array([1, 2, i % 60 + 4, i // 60 + 4]) for i in range(180)]
    settings = WritingConfig(max_new=40, drop_loops=False)
    for text in Writer(target, {0}, cache_tokens=180 * 44).write(prompts, settings):
        if len(text.tokens) > 3:
            heldout = text.row % 9 == 0
            shard.add(prompts[text.row], text.tokens, sampled=False, ended=text.ended, heldout=heldout)
    shard.write(folder / "shard-00000.safetensors", {})
    write_manifest(folder, {"shard-00000.safetensors": sha256(folder / "shard-00000.safetensors")}, {})
    return folder

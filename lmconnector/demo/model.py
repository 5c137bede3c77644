"""A tiny model folder, made offline: its random weights are such that a wrong KV cache gives other tokens.

usage: python -m lmconnector.demo.model FOLDER KIND
"""

import json
import sys
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 1024
SPECIAL = ["<pad>", "<s>", "</s>"]
BASE: dict[str, object] = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "hidden_size": 256,
    "intermediate_size": 680,
    "num_hidden_layers": 4,
}
HEADS: dict[str, object] = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    **HEADS,
}
KINDS: dict[str, dict[str, object]] = {
    "llama": LLAMA,
    "demo": {  # slow enough to see what a hit saves; float32: no two tokens so close that a rounding decides
        **LLAMA,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_key_value_heads": 2,
        "dtype": "float32",
    },
    "bench": {  # whose prompts take long enough, and whose KV cache is large enough, to tell figures apart
        **LLAMA,
        "max_position_embeddings": 16384,
        "hidden_size": 1024,
        "intermediate_size": 2752,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "one_head": {**LLAMA, "num_key_value_heads": 1},  # multi-query attention
    "convolution": {  # two of three layers keep a state instead of a KV cache
        "architectures": ["Lfm2ForCausalLM"],
        "model_type": "lfm2",
        "num_hidden_layers": 6,
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "conv_L_cache": 3,
        "conv_bias": False,
        "conv_dim": 256,
        "block_dim": 256,
        "block_ffn_dim_multiplier": 1.0,
        "block_norm_eps": 1e-5,
        "block_multiple_of": 8,
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 1e-5,
        **HEADS,
    },
    "sliding": {  # two of three layers see 128 tokens back
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 128,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        **HEADS,
    },
    "latent": {  # multi-head latent attention
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "first_k_dense_replace": 99,
        "moe_intermediate_size": 128,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_layer_freq": 1,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
    },
}


def make(folder: Path, kind: str) -> Path:
    folder.mkdir(parents=True)
    config = {**BASE, **KINDS[kind]}
    text = json.dumps(config)
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}'
    )
    _make_tokenizer(folder)
    _make_weights(folder, str(config["dtype"]))
    (folder / "config.json").write_text(text)  # saving the weights has reworded it
    return folder


def _make_tokenizer(folder: Path) -> None:
    rng = Random(0)  # noqa: S311  no secret
    words = ["".join(rng.choices("aeiounrstlm", k=rng.randint(2, 8))) for _ in range(2000)]
    lines = [" ".join(rng.choices(words, k=15)) for _ in range(1500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": SPECIAL[0],
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _make_weights(folder: Path, dtype: str) -> None:
    """Attention sharp enough to look at single tokens, logits far enough apart to show what it saw.

    Embeddings that are the logits' weights too are small: else the last token outweighs what attention saw.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    embedding = model.config.hidden_size**-0.5 if model.config.tie_word_embeddings else 1.0
    sharp = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_", "lm_head")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                scale = embedding if "embed" in name else weights.shape[1] ** -0.5
                scale *= 2.0 if any(part in name for part in sharp) else 1.0
                weights.copy_(torch.randn_like(weights) * scale)
    model.to(getattr(torch, dtype)).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]), sys.argv[2])

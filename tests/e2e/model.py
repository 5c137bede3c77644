"""A tiny model folder, made offline: its random weights are such that a wrong KV cache gives other tokens."""

import json
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 1024
SPECIAL = ["<pad>", "<s>", "</s>"]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
KINDS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "head_dim": 32,
        **HEADS,
    },
    "sliding": {  # two of three layers see 128 tokens back
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "head_dim": 32,
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
    layers = len(KINDS[kind].get("layer_types", range(4)))
    text = json.dumps(
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 8192,
            "dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "hidden_size": 256,
            "intermediate_size": 680,
            "num_hidden_layers": layers,
            **KINDS[kind],
        }
    )
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_text(
        '{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}'
    )
    _make_tokenizer(folder)
    _make_weights(folder)
    (folder / "config.json").write_text(text)  # saving the weights has reworded it
    return folder


def _make_tokenizer(folder: Path) -> None:
    rng = Random(0)
    words = ["".join(rng.choices("aeiounrstlm", k=rng.randint(2, 8))) for _ in range(2000)]
    lines = [" ".join(rng.choices(words, k=15)) for _ in range(1500)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
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


def _make_weights(folder: Path) -> None:
    """Attention sharp enough to look at single tokens, logits far enough apart to show what it saw."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    sharp = ("q_proj", "k_proj", "v_proj", "o_proj", "kv_", "lm_head")
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:
                scale = 1.0 if "embed" in name else weights.shape[1] ** -0.5
                scale *= 2.0 if any(part in name for part in sharp) else 1.0
                weights.copy_(torch.randn_like(weights) * scale)
    model.to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)

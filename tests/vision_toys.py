"""Random models that read images, of several families, as folders that users would have: with processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from llm_toys import VOCABULARY

SPECIAL = {
    "<image>": 70, "<|image_pad|>": 71, "<|video_pad|>": 72, "<|vision_start|>": 73, "<|vision_end|>": 74, "[IMG]": 75,
    "[IMG_BREAK]": 76, "[IMG_END]": 77, "<boi>": 78, "<eoi>": 79, "<global-img>": 80, "<fake_token_around_image>": 81,
    "<end_of_utterance>": 82, "<|video|>": 83, "\n\n": 84, "user": 85, "assistant": 86, "<turn>": 87, "<audio>": 88,
    "<boa>": 89, "<eoa>": 90, **{f"<row_{i}_col_{j}>": 90 for i in (1, 2) for j in (1, 2)},
}  # fmt: skip
"""Tokens of processors, by name."""
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 256, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8,
}  # fmt: skip
TOWER = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
TURNING = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN = {
    "image_token_id": 71, "video_token_id": 72, "vision_start_token_id": 73, "vision_end_token_id": 74,
}  # fmt: skip
QWEN_TOWER = {
    "depth": 4, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "fullatt_block_indexes": [1], "window_size": 16,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
FAMILIES: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "image_token_index": 70, "image_seq_length": 16,
    },
    "qwen2_vl": {
        **QWEN, "text_config": {**TEXT, "rope_parameters": TURNING},
        "vision_config": {**QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {**QWEN, "text_config": {**TEXT, "rope_parameters": TURNING}, "vision_config": QWEN_TOWER},
    "qwen3_vl": {
        **QWEN, "text_config": {**TEXT, "rope_parameters": {**TURNING, "mrope_interleaved": True}},
        "vision_config": {**QWEN_TOWER, "num_position_embeddings": 16, "deepstack_visual_indexes": [1, 2]},
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 5, "query_pre_attn_scalar": 8}, "vision_config": SIGLIP,
        "mm_tokens_per_image": 4, "image_token_index": 70, "boi_token_index": 78, "eoi_token_index": 79,
    },
    "gemma4": {
        "text_config": {
            **TEXT, "num_kv_shared_layers": 0, "global_head_dim": 8, "sliding_window": 5,
            "vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8,
        },
        "vision_config": {**TOWER, "pooling_kernel_size": 3, "num_key_value_heads": 2, "head_dim": 8},
        "audio_config": None, "image_token_id": 70, "boi_token_id": 78, "eoi_token_id": 79,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **TEXT}, "vision_config": TOWER, "image_token_id": 70,
        "scale_factor": 2,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **TEXT},
        "vision_config": {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": 70, "downsample_ratio": 0.5, "image_seq_length": 4,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **TEXT},
        "vision_config": {"model_type": "pixtral", **TOWER, "head_dim": 8},
        "image_token_index": 75, "spatial_merge_size": 2,
    },
}  # fmt: skip
TEMPLATE = (
    "{%% for m in messages %%}<turn> {{ m.role }} {%% for part in m.content %%}{%% if part.type == 'image' %%}%s"
    "{%% else %%}{{ part.text }}{%% endif %%} {%% endfor %%}{%% endfor %%}"
    "{%% if add_generation_prompt %%}<turn> assistant {%% endif %%}"
)
"""How a processor writes turns; what stands for an image is left out."""
VIDEOS = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
"""Classes of processors, and those for videos in them, of families that share one for images."""
PLACES = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
SQUARE = {"height": 16, "width": 16}


def processor(family: str) -> Any:
    """The processor of a family, in the sizes of its network here, with a chat template."""
    made = _processor(family)
    image = getattr(made, "boi_token", made.image_token) if family == "gemma3" else made.image_token
    made.chat_template = TEMPLATE % (f"<|vision_start|>{image}<|vision_end|>" if family in VIDEOS else image)
    return made


def _processor(family: str) -> Any:
    t = transformers
    edges = {"shortest_edge": 64, "longest_edge": 1024}
    grid = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": edges}
    if family in VIDEOS:
        kind, video = VIDEOS[family]
        return getattr(t, kind)(t.Qwen2VLImageProcessor(**grid), words(), getattr(t, video)(**grid))
    if family == "llava":
        images = t.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SQUARE)
        options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return t.LlavaProcessor(images, words(), **options)
    if family == "gemma3":
        return t.Gemma3Processor(t.Gemma3ImageProcessor(size=SQUARE), words(**PLACES), image_seq_length=4)
    if family == "gemma4":
        pooled = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3}
        made = words(**PLACES, audio_token="<audio>", boa_token="<boa>", eoa_token="<eoa>")
        images, video = t.Gemma4ImageProcessor(**pooled), t.Gemma4VideoProcessor(**pooled)
        return t.Gemma4Processor(t.Gemma4AudioFeatureExtractor(), images, made, video)
    if family == "idefics3":
        images = t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return t.Idefics3Processor(images, words(), image_seq_len=4)
    if family == "internvl":
        images = t.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=2)
        named = {"start_image_token": "<boi>", "end_image_token": "<eoi>", "context_image_token": "<image>"}
        made = words(**named, video_token="<|video|>")
        return t.InternVLProcessor(images, made, t.InternVLVideoProcessor(size=SQUARE), image_seq_length=4)
    images = t.PixtralImageProcessor(size={"longest_edge": 16}, patch_size=4)
    return t.PixtralProcessor(images, words(), patch_size=4, spatial_merge_size=2)


def words(**special: str) -> Any:
    """A tokenizer of words, one number each, and of these special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    named = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 70)}, **SPECIAL}
    fast = Tokenizer(models.WordLevel(named, unk_token="w3"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast.add_special_tokens([name for name in SPECIAL if name.startswith(("<", "["))])
    kind = transformers.PreTrainedTokenizerFast
    return kind(
        tokenizer_object=fast, eos_token="</s>", bos_token="<s>", pad_token="<pad>", extra_special_tokens=special
    )


def folder(path: Path, family: str) -> Path:
    """A folder with a random model that reads images, no weight of which is zero, and its processor."""
    config = transformers.AutoConfig.for_model(family, **FAMILIES[family])
    model: Any = transformers.AutoModelForImageTextToText.from_config(config)
    rng = torch.Generator().manual_seed(1)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2, generator=rng)
    model.save_pretrained(path)
    processor(family).save_pretrained(path)
    return path


def captions(path: Path, num: int = 8) -> Path:
    """A JSONL file of pictures beside it, with questions and answers; the second has two pictures, the third none."""
    path.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(2)
    rows = []
    for i in range(num):
        names = [f"{i}{j}.png" for j in range({1: 2, 2: 0}.get(i, 1))]
        for j, name in enumerate(names):
            size = (16 + 8 * (i % 3), 16 + 8 * j, 3)
            Image.fromarray(torch.randint(256, size, generator=rng, dtype=torch.uint8).numpy()).save(path / name)
        rows.append(
            {
                "images": names,
                "prompt": f"w{5 + i} w{6 + i}",
                "text": " ".join(f"w{7 + i + k}" for k in range(3 + i % 3)),
            }
        )
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path / "captions.jsonl"

"""The tiny Stable Diffusion 3 pipeline of the built-in world.

The classes are those of Stable Diffusion 3.5: an AutoencoderKL, an SD3Transformer2DModel, two CLIP
text encoders, a T5 text encoder and a flow-matching scheduler with shift 3. There is one image
token per cell of the scene's grid. The text encoders keep their random initialisation, which
suffices to distinguish forty words and their order.
"""

# The annotations of diffusers are too narrow.
# pyright: reportArgumentType=false

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from diffusion_nft.shapes.captions import MAX_WORDS, vocabulary
from diffusion_nft.shapes.scene import IMAGE_SIZE

PIPELINE_DIR = Path(__file__).parent / "pipeline"

# Of the CLIP and the T5 encoders: the words of the longest caption, and the end token.
MAX_SEQUENCE_LENGTH = MAX_WORDS + 1

LATENT_CHANNELS = 4
LATENT_SIZE = IMAGE_SIZE // 4
CLIP_WIDTH = 48
T5_WIDTH = 2 * CLIP_WIDTH

PAD_TOKEN, UNKNOWN_TOKEN, START_TOKEN, END_TOKEN = "<pad>", "<unk>", "<start>", "<end>"
SPECIAL_TOKENS = (PAD_TOKEN, UNKNOWN_TOKEN, START_TOKEN, END_TOKEN)


def load_shapes_pipeline(torch_dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The pretrained pipeline of the package, on the CPU."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, dtype=torch_dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of the captions' vocabulary, which appends the end token."""
    token_ids = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(token_ids, unk_token=UNKNOWN_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END_TOKEN}", special_tokens=[(END_TOKEN, token_ids[END_TOKEN])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        model_max_length=MAX_SEQUENCE_LENGTH,
    )


def build_clip(vocab_size: int) -> CLIPTextModelWithProjection:
    """A random CLIP text encoder; hidden states and pooled output have about unit variance."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_SEQUENCE_LENGTH,
        pad_token_id=SPECIAL_TOKENS.index(PAD_TOKEN),
        bos_token_id=SPECIAL_TOKENS.index(START_TOKEN),
        eos_token_id=SPECIAL_TOKENS.index(END_TOKEN),
    )
    encoder = CLIPTextModelWithProjection(config)
    for name, parameter in encoder.named_parameters():
        if "token_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.8)
        elif "position_embedding" in name:
            torch.nn.init.normal_(parameter, std=0.6)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return encoder.eval().requires_grad_(False)


def build_t5(vocab_size: int) -> T5EncoderModel:
    """A random T5 encoder; its last layer norm gives the output unit variance."""
    config = T5Config(
        vocab_size=vocab_size,
        d_model=T5_WIDTH,
        d_kv=24,
        d_ff=2 * T5_WIDTH,
        num_layers=2,
        num_heads=4,
        pad_token_id=SPECIAL_TOKENS.index(PAD_TOKEN),
        eos_token_id=SPECIAL_TOKENS.index(END_TOKEN),
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval().requires_grad_(False)


def build_vae() -> AutoencoderKL:
    """An autoencoder from [3, 48, 48] to [4, 12, 12]."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> SD3Transformer2DModel:
    """A velocity network over nine image tokens, one per cell of the grid."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=LATENT_SIZE // 4,
        qk_norm="rms_norm",
    )


def build_pipeline(
    vae: AutoencoderKL, transformer: SD3Transformer2DModel, seed: int
) -> StableDiffusion3Pipeline:
    """A pipeline with random text encoders, which depend only on `seed`."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        clips = [build_clip(len(tokenizer)) for _ in range(2)]
        t5 = build_t5(len(tokenizer))
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=tokenizer,
    )

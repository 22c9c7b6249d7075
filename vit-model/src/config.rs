//! `Config`: every switch of the ViT family as data, and the JSON document that our files carry.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The architecture of a Vision Transformer (arXiv 2010.11929 and its family), under timm's names.
///
/// The same fields, in this order, are the `model` object of the `config` that our safetensors files carry. A switch
/// that was added later has a default which means "absent", and is left out of the JSON where it has that default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `[height, width]` of the image in pixels.
    pub img_size: [usize; 2],
    /// `[height, width]` of a patch in pixels; what does not fill a patch at the right and bottom is not read.
    pub patch_size: [usize; 2],
    /// Channels of the image.
    pub in_chans: usize,
    /// Classes of the head; 0: no head, features only.
    pub num_classes: usize,
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads of a block; they divide `embed_dim`.
    pub num_heads: usize,
    /// Hidden width of the MLP: rows of `fc1` (of each half, where `mlp` is `swiglu`; of both, where `swiglu_packed`).
    pub mlp_hidden: usize,
    /// The kind of MLP.
    pub mlp: MlpKind,
    /// The activation in the MLP (in its gate, where it has one).
    pub act: Activation,
    /// ε of every norm.
    pub ln_eps: f64,
    /// The patch embedding has a bias.
    pub patch_bias: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The projection after the attention has a bias.
    pub proj_bias: bool,
    /// q and k are normed per head before the attention.
    pub qk_norm: bool,
    /// A class token stands first.
    pub class_token: bool,
    /// DeiT's distillation token stands second, and a second head reads it.
    pub dist_token: bool,
    /// Register tokens between the class token and the patches.
    pub reg_tokens: usize,
    /// `pos_embed` covers the patches only.
    pub no_embed_class: bool,
    /// There is a position embedding.
    pub pos_embed: bool,
    /// A norm before the first block (`norm_pre`, as CLIP has it).
    pub pre_norm: bool,
    /// A norm after the last block, before (`norm`) or after (`fc_norm`) the pooling.
    pub final_norm: bool,
    /// That norm stands after the pooling.
    pub fc_norm: bool,
    /// LayerScale (`ls1.gamma`, `ls2.gamma`).
    pub layer_scale: bool,
    /// How tokens become one vector.
    pub global_pool: Pool,
    /// A linear and tanh before the head, as the original ViT had for ImageNet-21k.
    pub pre_logits: Option<PreLogits>,
    /// The head has a bias.
    pub head_bias: bool,

    /// The kind of every norm.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm: NormKind,
    /// A norm in the patch embedding (`patch_embed.norm`), as AIMv2 has it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub patch_norm: bool,
    /// A norm before `attn.proj` (`attn.norm`), as BEiT-3 has it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_attn_norm: bool,
    /// A norm before `mlp.fc2` (`mlp.norm`), as BEiT-3 has it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_mlp_norm: bool,
    /// The wiring of a block.
    #[serde(default, skip_serializing_if = "is_default")]
    pub block: BlockKind,
    /// Differential attention in every block (arXiv 2410.05258).
    #[serde(default, skip_serializing_if = "is_default")]
    pub diff_attn: bool,
    /// Pooling by mean or max reads the prefix tokens too.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pool_include_prefix: bool,
}

/// The kind of MLP in a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MlpKind {
    /// `fc2(act(fc1(x)))`
    #[default]
    Mlp,
    /// `fc2(act(fc1_g(x)) · fc1_x(x))`
    Swiglu,
    /// As `Swiglu`, with gate and value in one `fc1`, the gate's rows first.
    SwigluPacked,
}

/// The activation of the MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x/2 · (1 + erf(x/√2))`
    #[default]
    Gelu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`
    GeluTanh,
    /// `x · sigmoid(1.702 x)`
    QuickGelu,
    /// `max(x, 0)`
    Relu,
    /// `x · sigmoid(x)`
    Silu,
}

/// How tokens become the one vector that the head reads (timm's `global_pool`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pool {
    /// The class token.
    #[default]
    Token,
    /// The mean of the patch tokens.
    Avg,
    /// Attention pooling with a learned query (`attn_pool`, arXiv 2106.04560).
    Map,
    /// The maximum over the patch tokens.
    Max,
    /// The mean of `Avg` and `Max`.
    Avgmax,
    /// The class token and the mean of the patch tokens, side by side: twice as wide (transformers'
    /// `Dinov2ForImageClassification`; timm has none).
    TokenAvg,
    /// None: the head, if there is one, reads every token.
    #[serde(rename = "")]
    None,
}

/// The kind of every norm in a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NormKind {
    /// Mean and variance over the channels, weight and bias.
    #[default]
    LayerNorm,
    /// Root mean square over the channels, weight only.
    RmsNorm,
}

/// The wiring of a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockKind {
    /// `x + attn(norm1(x))`, then `x + mlp(norm2(x))`.
    #[default]
    Standard,
    /// `x + norm1(attn(x))`, then `x + norm2(mlp(x))` (timm's `ResPostBlock`).
    ResPost,
    /// Attention and MLP side by side from one projection (timm's `ParallelScalingBlock`, arXiv 2302.05442).
    ParallelScaling,
    /// Two attentions side by side, then two MLPs (timm's `ParallelThingsBlock`, arXiv 2203.09795).
    ParallelThings,
    /// `ParallelScaling` with differential attention (timm's `DiffParallelScalingBlock`, arXiv 2410.05258).
    DiffParallelScaling,
}

/// `tanh(fc(x))` before the head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreLogits {
    /// Width of `pre_logits.fc`.
    pub size: usize,
    /// The activation; only `tanh` exists.
    pub act: String,
}

/// How a photograph becomes the model's input, under the names of timm's `pretrained_cfg`.
///
/// The picture is resized (by `resize` if that is there, else by `crop_mode` and `crop_pct`), cropped at its centre to
/// `input_size` (padded, where it is smaller), divided by 255 and normalised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PreprocessConfig {
    /// `[channels, height, width]` of the input.
    pub input_size: [usize; 3],
    /// The resampling filter: `bicubic`, `bilinear`, `lanczos`, `box`, `nearest`, `hamming`.
    pub interpolation: String,
    /// The resize target is `floor(size / crop_pct)`; the crop is `size`.
    pub crop_pct: f64,
    /// `center`, `squash` or `border`, as in timm's `transforms_factory.py`; `none` with a `resize` that no crop follows.
    pub crop_mode: String,
    /// Subtracted per channel, after `/255`.
    pub mean: Vec<f64>,
    /// Divided by per channel, after the mean.
    pub std: Vec<f64>,
    /// A resize that `crop_pct` cannot express (Hugging Face's `size`); it takes the place of `crop_mode` and `crop_pct`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub resize: Option<Resize>,
    /// The arithmetic of Hugging Face's processors: torchvision's 8-bit resize, the crop's offset rounded down. Absent:
    /// timm's, which is Pillow's resize and an offset rounded half to even.
    #[serde(default, skip_serializing_if = "is_default")]
    pub torchvision: bool,
    /// The one transparent colour that a palette or grey file may have becomes white (`do_convert_rgb` does so). Absent:
    /// it is dropped like all transparency.
    #[serde(default, skip_serializing_if = "is_default")]
    pub white_key: bool,
}

/// The size that a picture is resized to before the crop, in pixels (the forms of Hugging Face's `size`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// Not resized.
    None,
    /// `[height, width]`, whatever the picture's aspect ratio.
    Exact([usize; 2]),
    /// The shorter edge; the longer one follows.
    ShortestEdge(usize),
    /// `[shortest, longest]`: the shorter edge, or less where the longer one would grow beyond its own limit.
    Edges([usize; 2]),
    /// `[max_height, max_width]`: as large as fits into both.
    Within([usize; 2]),
}

impl PreprocessConfig {
    /// timm's defaults for an image size: bicubic, `crop_pct` 0.9, mean and standard deviation 0.5.
    pub fn for_config(config: &Config) -> Self {
        let [h, w] = config.img_size;
        Self {
            input_size: [config.in_chans, h, w],
            interpolation: "bicubic".into(),
            crop_pct: 0.9,
            crop_mode: "center".into(),
            mean: vec![0.5; config.in_chans],
            std: vec![0.5; config.in_chans],
            resize: None,
            torchvision: false,
            white_key: false,
        }
    }
}

/// The JSON document that a safetensors file of ours carries in `__metadata__.config`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelInfo {
    /// Version of this document: 1.
    pub vit: u32,
    /// The architecture.
    pub model: Config,
    /// How an image becomes the input.
    pub preprocess: PreprocessConfig,
    /// Class names, one per class.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// Where the weights come from: `producer`, `opset`, `sha256`, …
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub source: BTreeMap<String, serde_json::Value>,
    /// The result of the conversion's verification.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<serde_json::Value>,
}

impl ModelInfo {
    /// Refuses what no model can have.
    pub fn validate(&self) -> Result<()> {
        self.model.validate()?;
        if let Some(labels) = self.labels.as_ref().filter(|labels| labels.len() != self.model.num_classes) {
            let classes = self.model.num_classes;
            return Err(Error::Config(format!(
                "`labels` must be {classes} names, one per class, found {}",
                labels.len()
            )));
        }
        Ok(())
    }
}

impl Config {
    /// Rows and columns of patches: `floor(img_size / patch_size)`.
    pub fn grid(&self) -> [usize; 2] {
        let ([h, w], [p, q]) = (self.img_size, self.patch_size);
        [h.checked_div(p).unwrap_or(0), w.checked_div(q).unwrap_or(0)]
    }

    /// Patches of an image.
    pub fn num_patches(&self) -> usize {
        let [h, w] = self.grid();
        h.saturating_mul(w)
    }

    /// Tokens before the patches: class, distillation and registers.
    pub fn num_prefix_tokens(&self) -> usize {
        self.reg_tokens.saturating_add(usize::from(self.class_token)).saturating_add(usize::from(self.dist_token))
    }

    /// Tokens of an image.
    pub fn num_tokens(&self) -> usize {
        self.num_patches().saturating_add(self.num_prefix_tokens())
    }

    /// Patches of an image at most.
    pub const MAX_PATCHES: usize = 1 << 20;

    /// Rows of `pos_embed` before those of the patches.
    pub fn pos_embed_prefix(&self) -> usize {
        if self.no_embed_class { 0 } else { self.num_prefix_tokens() }
    }

    /// Rows of `pos_embed`.
    pub fn pos_embed_len(&self) -> usize {
        if self.no_embed_class { self.num_patches() } else { self.num_tokens() }
    }

    /// Width of the vector that pooling makes.
    pub fn pooled_dim(&self) -> usize {
        if self.global_pool == Pool::TokenAvg { self.embed_dim.saturating_mul(2) } else { self.embed_dim }
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.embed_dim.checked_div(self.num_heads).unwrap_or(0)
    }

    /// Refuses what no model can have, before anything is allocated from it.
    pub fn validate(&self) -> Result<()> {
        let fail = |why: String| Err(Error::Config(why));
        for (name, value, max) in [
            ("img_size[0]", self.img_size[0], 16384),
            ("img_size[1]", self.img_size[1], 16384),
            ("patch_size[0]", self.patch_size[0], 16384),
            ("patch_size[1]", self.patch_size[1], 16384),
            ("in_chans", self.in_chans, 1024),
            ("embed_dim", self.embed_dim, 1 << 16),
            ("depth", self.depth, 1024),
            ("num_heads", self.num_heads, 1 << 16),
            ("mlp_hidden", self.mlp_hidden, 1 << 20),
        ] {
            if value == 0 || value > max {
                return fail(format!("`{name}` must be between 1 and {max}, found {value}"));
            }
        }
        if self.num_classes > 1 << 24 {
            return fail(format!("`num_classes` must be at most {}, found {}", 1 << 24, self.num_classes));
        }
        if self.reg_tokens > 1 << 16 {
            return fail(format!("`reg_tokens` must be at most {}, found {}", 1 << 16, self.reg_tokens));
        }
        if !self.embed_dim.is_multiple_of(self.num_heads) {
            return fail(format!("`num_heads` {} does not divide `embed_dim` {}", self.num_heads, self.embed_dim));
        }
        let diff = self.diff_attn || self.block == BlockKind::DiffParallelScaling;
        if diff && !self.head_dim().is_multiple_of(2) {
            return fail(format!("differential attention halves a head, and {} channels are odd", self.head_dim()));
        }
        if self.num_patches() == 0 {
            return fail(format!("an image of {:?} holds no patch of {:?}", self.img_size, self.patch_size));
        }
        if self.num_patches() > Self::MAX_PATCHES {
            return fail(format!("{} patches, at most {} are supported", self.num_patches(), Self::MAX_PATCHES));
        }
        if !(self.ln_eps.is_finite() && self.ln_eps > 0.0 && self.ln_eps < 1.0) {
            return fail(format!("`ln_eps` must be between 0 and 1, found {}", self.ln_eps));
        }
        if matches!(self.global_pool, Pool::Token | Pool::TokenAvg) && !self.class_token {
            return fail("`global_pool` token needs a class token".into());
        }
        if self.dist_token && !self.class_token {
            return fail("`dist_token` needs a class token".into());
        }
        if self.mlp == MlpKind::SwigluPacked && !self.mlp_hidden.is_multiple_of(2) {
            return fail(format!("`mlp_hidden` of swiglu_packed must be even, found {}", self.mlp_hidden));
        }
        if let Some(pre) = &self.pre_logits
            && (pre.act != "tanh" || pre.size == 0 || pre.size > 1 << 20)
        {
            return fail(format!("`pre_logits` must be tanh and of a size up to {}, found {pre:?}", 1 << 20));
        }
        Ok(())
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

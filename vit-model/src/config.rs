//! `Config`: every architectural switch of the ViT family as data.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
#![deny(clippy::as_conversions)]

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The architecture of a Vision Transformer (arXiv 2010.11929 and its family), under timm's names.
///
/// The `model` object in the `config` of our safetensors files has the same fields in this order. A switch that was
/// added later has a default that means "absent", and is left out of the JSON if it has that default.
///
/// Adding a switch takes a field, its default in [`vit`](Self::vit), and the places where it acts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Config {
    /// `[height, width]` of the image in pixels.
    pub img_size: [usize; 2],
    /// `[height, width]` of a patch in pixels. Pixels that do not fill a patch at the right and bottom edges are
    /// ignored.
    pub patch_size: [usize; 2],
    /// Channels of the image.
    pub in_chans: usize,
    /// Number of classes. If it is 0, the model has no head and returns features.
    pub num_classes: usize,
    /// Width of a token.
    pub embed_dim: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads in a block. `embed_dim` must be a multiple of it.
    pub num_heads: usize,
    /// Outputs of the MLP's `fc1`: of `fc1_g` and `fc1_x` each for `swiglu`, of gate and value together for
    /// `swiglu_packed`.
    pub mlp_hidden: usize,
    /// The kind of MLP.
    pub mlp: MlpKind,
    /// The activation in the MLP, or in its gate if it has one.
    pub act: Activation,
    /// ε of every norm.
    pub ln_eps: f64,
    /// The patch embedding has a bias.
    pub patch_bias: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The projection after the attention has a bias.
    pub proj_bias: bool,
    /// q and k are normalised per head before attention.
    pub qk_norm: bool,
    /// The first token is a class token.
    pub class_token: bool,
    /// The second token is DeiT's distillation token, which a second head reads.
    pub dist_token: bool,
    /// Number of register tokens between the class token and the patches.
    pub reg_tokens: usize,
    /// `pos_embed` covers only the patches.
    pub no_embed_class: bool,
    /// The model has a position embedding.
    pub pos_embed: bool,
    /// A norm before the first block (`norm_pre`), as in CLIP.
    pub pre_norm: bool,
    /// A norm after the last block, either before (`norm`) or after (`fc_norm`) pooling.
    pub final_norm: bool,
    /// The final norm runs after pooling.
    pub fc_norm: bool,
    /// LayerScale (`ls1.gamma`, `ls2.gamma`).
    pub layer_scale: bool,
    /// How tokens are pooled into one vector.
    pub global_pool: Pool,
    /// A linear layer and tanh before the head, as in the original ViT for ImageNet-21k.
    pub pre_logits: Option<PreLogits>,
    /// The head has a bias.
    pub head_bias: bool,

    /// The kind of every norm.
    #[serde(default, skip_serializing_if = "is_default")]
    pub norm: NormKind,
    /// A norm in the patch embedding (`patch_embed.norm`), as in AIMv2.
    #[serde(default, skip_serializing_if = "is_default")]
    pub patch_norm: bool,
    /// A norm before `attn.proj` (`attn.norm`), as in BEiT-3.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_attn_norm: bool,
    /// A norm before `mlp.fc2` (`mlp.norm`), as in BEiT-3.
    #[serde(default, skip_serializing_if = "is_default")]
    pub scale_mlp_norm: bool,
    /// The wiring of a block.
    #[serde(default, skip_serializing_if = "is_default")]
    pub block: BlockKind,
    /// Differential attention in every block (arXiv 2410.05258).
    #[serde(default, skip_serializing_if = "is_default")]
    pub diff_attn: bool,
    /// Pooling includes the prefix tokens (class, distillation, registers).
    #[serde(default, skip_serializing_if = "is_default")]
    pub pool_include_prefix: bool,
    /// Rotary positions: the channels of q and k are rotated in pairs, by angles that depend on the patch's position.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rope: Option<Rope>,
    /// Biases of the attention's scores that depend on how far apart two patches are.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rel_pos_bias: RelPosBias,
    /// q, k and v have a linear layer each (`q_proj`, `k_proj`, `v_proj`).
    #[serde(default, skip_serializing_if = "is_default")]
    pub split_qkv: bool,
    /// k has no bias although q and v have one (`q_bias` and `v_bias` beside a joint `qkv`).
    #[serde(default, skip_serializing_if = "is_default")]
    pub no_k_bias: bool,
    /// Heads of k and v in each block, if they are fewer than those of q. Head `h` of q reads head `h / (H / kv)`. Empty
    /// if every block has `num_heads`. Needs `split_qkv`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub kv_heads: Vec<usize>,
    /// LayerScale is on the attention's branch only.
    #[serde(default, skip_serializing_if = "is_default")]
    pub attn_only_scale: bool,
    /// The factors of LayerScale are `gamma_1` and `gamma_2` of a block, as in EVA and BEiT.
    #[serde(default, skip_serializing_if = "is_default")]
    pub block_gammas: bool,
    /// Attention pooling has another number of heads or another MLP than the blocks.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pool: Option<PoolSizes>,
}

/// Rotary positions of patches (arXiv 2104.09864, in two dimensions). Prefix tokens are not rotated.
///
/// A head's first half of pairs turns by one coordinate and the second half by the other, unless the kind is `Mixed`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Rope {
    /// How angles follow from positions.
    pub kind: RopeKind,
    /// The base of the geometric sequence of frequencies. A `Mixed` model has learned frequencies instead.
    pub temperature: f64,
    /// What is added to each coordinate: in patches, before it is scaled to `ref_grid` or normalised.
    #[serde(default, skip_serializing_if = "is_default")]
    pub grid_offset: f64,
    /// The column is the first coordinate, and the row the second.
    #[serde(default, skip_serializing_if = "is_default")]
    pub column_first: bool,
    /// A pair is made of the channels `i` and `i + d/2` of a head, instead of two neighbours.
    #[serde(default, skip_serializing_if = "is_default")]
    pub rotate_half: bool,
    /// Coordinates are scaled from the image's grid of patches to this one, `[rows, columns]`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ref_grid: Option<[usize; 2]>,
}

impl Rope {
    /// Rotary positions without an offset, a reference grid or the other layouts.
    pub const fn new(kind: RopeKind, temperature: f64) -> Self {
        Self { kind, temperature, grid_offset: 0.0, column_first: false, rotate_half: false, ref_grid: None }
    }
}

/// How the angles of rotary positions follow from a patch's position.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RopeKind {
    /// Row and column number, times fixed frequencies (EVA-02, Perception Encoder, RoPE-ViT).
    #[default]
    Axial,
    /// The patch's centre between −1 and 1 of each axis, times 2π times fixed frequencies (DINOv3).
    Centred,
    /// Row and column number, each times a frequency that every head of every block learns (`rope.freqs`), added
    /// (RoPE-ViT, arXiv 2403.13298).
    Mixed,
}

/// Where biases by relative position come from (BEiT, arXiv 2106.08254).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RelPosBias {
    /// There are none.
    #[default]
    None,
    /// Each block has a table (`blocks.N.attn.relative_position_bias_table`).
    Blocks,
    /// All blocks share a table (`rel_pos_bias.relative_position_bias_table`).
    Shared,
}

/// The sizes of attention pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PoolSizes {
    /// Attention heads.
    pub num_heads: usize,
    /// Outputs of the MLP's `fc1`.
    pub mlp_hidden: usize,
}

impl PoolSizes {
    /// So many heads, and an MLP with a hidden layer of this width.
    pub const fn new(num_heads: usize, mlp_hidden: usize) -> Self {
        Self { num_heads, mlp_hidden }
    }
}

/// The kind of MLP in a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MlpKind {
    /// `fc2(act(fc1(x)))`
    #[default]
    Mlp,
    /// `fc2(act(fc1_g(x)) · fc1_x(x))`
    Swiglu,
    /// Like `Swiglu`, with gate and value in one `fc1`, the gate's rows first.
    SwigluPacked,
}

/// The activation of the MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
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

/// How tokens are pooled into the vector that the head reads (timm's `global_pool`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
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
    /// The class token and the mean of the patch tokens, concatenated, so twice as wide
    /// (`Dinov2ForImageClassification` in transformers; timm has no equivalent).
    TokenAvg,
    /// No pooling: the head, if there is one, is applied to every token.
    #[serde(rename = "")]
    None,
}

/// The kind of every norm in a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
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
#[non_exhaustive]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct PreLogits {
    /// Width of `pre_logits.fc`.
    pub size: usize,
    /// The activation.
    pub act: PreLogitsActivation,
}

impl PreLogits {
    /// `tanh(fc(x))` with `size` outputs.
    pub const fn tanh(size: usize) -> Self {
        Self { size, act: PreLogitsActivation::Tanh }
    }
}

/// The activation after `pre_logits.fc`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum PreLogitsActivation {
    /// `tanh(x)`
    #[default]
    Tanh,
}

impl Default for Config {
    /// ViT-B/16 for 224 × 224 pixels and ImageNet's 1000 classes.
    fn default() -> Self {
        Self::vit([224, 224], [16, 16], 768, 12, 12)
    }
}

impl Config {
    /// The Vision Transformer of the original paper (arXiv 2010.11929) in another size, as timm builds it: RGB images,
    /// 1000 classes, an MLP four times as wide as a token, a class token that the head reads, and every other switch
    /// off.
    ///
    /// Set the fields that differ:
    /// ```
    /// use vit_model::{Config, Pool};
    ///
    /// let mut config = Config::vit([224, 224], [16, 16], 192, 12, 3);
    /// config.num_classes = 5;
    /// (config.class_token, config.global_pool, config.fc_norm) = (false, Pool::Avg, true);
    /// # config.validate().unwrap();
    /// ```
    pub const fn vit(
        img_size: [usize; 2],
        patch_size: [usize; 2],
        embed_dim: usize,
        depth: usize,
        num_heads: usize,
    ) -> Self {
        Self {
            img_size,
            patch_size,
            in_chans: 3,
            num_classes: 1000,
            embed_dim,
            depth,
            num_heads,
            mlp_hidden: embed_dim.saturating_mul(4),
            mlp: MlpKind::Mlp,
            act: Activation::Gelu,
            ln_eps: 1e-6,
            patch_bias: true,
            qkv_bias: true,
            proj_bias: true,
            qk_norm: false,
            class_token: true,
            dist_token: false,
            reg_tokens: 0,
            no_embed_class: false,
            pos_embed: true,
            pre_norm: false,
            final_norm: true,
            fc_norm: false,
            layer_scale: false,
            global_pool: Pool::Token,
            pre_logits: None,
            head_bias: true,
            norm: NormKind::LayerNorm,
            patch_norm: false,
            scale_attn_norm: false,
            scale_mlp_norm: false,
            block: BlockKind::Standard,
            diff_attn: false,
            pool_include_prefix: false,
            rope: None,
            rel_pos_bias: RelPosBias::None,
            split_qkv: false,
            no_k_bias: false,
            kv_heads: Vec::new(),
            attn_only_scale: false,
            block_gammas: false,
            pool: None,
        }
    }

    /// The names of the later switches that are set: those that the JSON of a plain ViT leaves out.
    ///
    /// Code that cannot handle every switch, such as the CPU engine or a writer for another library, refuses models
    /// with one that it does not know, so that a new switch is never ignored silently.
    pub(crate) fn later_switches(&self) -> Vec<String> {
        let fields = |config: &Self| match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let plain = fields(&Self::default());
        fields(self).into_iter().map(|(name, _)| name).filter(|name| !plain.contains_key(name)).collect()
    }

    /// Rows and columns of patches: `floor(img_size / patch_size)`.
    pub fn grid(&self) -> [usize; 2] {
        let ([h, w], [p, q]) = (self.img_size, self.patch_size);
        [h.checked_div(p).unwrap_or(0), w.checked_div(q).unwrap_or(0)]
    }

    /// Number of patches in an image.
    pub fn num_patches(&self) -> usize {
        let [h, w] = self.grid();
        h.saturating_mul(w)
    }

    /// Number of tokens before the patches: class, distillation and registers.
    pub fn num_prefix_tokens(&self) -> usize {
        self.reg_tokens.saturating_add(usize::from(self.class_token)).saturating_add(usize::from(self.dist_token))
    }

    /// Number of tokens of an image.
    pub fn num_tokens(&self) -> usize {
        self.num_patches().saturating_add(self.num_prefix_tokens())
    }

    /// The largest number of patches in an image.
    pub const MAX_PATCHES: usize = 1 << 16;

    /// Rows of `pos_embed` that belong to prefix tokens.
    pub fn pos_embed_prefix(&self) -> usize {
        if self.no_embed_class { 0 } else { self.num_prefix_tokens() }
    }

    /// Rows of `pos_embed`.
    pub fn pos_embed_len(&self) -> usize {
        if self.no_embed_class { self.num_patches() } else { self.num_tokens() }
    }

    /// Width of the pooled vector.
    pub fn pooled_dim(&self) -> usize {
        if self.global_pool == Pool::TokenAvg { self.embed_dim.saturating_mul(2) } else { self.embed_dim }
    }

    /// Width of an attention head.
    pub fn head_dim(&self) -> usize {
        self.embed_dim.checked_div(self.num_heads).unwrap_or(0)
    }

    /// Heads of k and v in a block.
    pub fn num_kv_heads(&self, block: usize) -> usize {
        self.kv_heads.get(block).copied().unwrap_or(self.num_heads)
    }

    /// Rows of a table of biases by relative position for images of the model's size: every distance between two patches,
    /// then class to patch, patch to class, and class to class.
    pub fn rel_pos_len(&self) -> usize {
        let [h, w] = self.grid().map(|side| side.saturating_mul(2).saturating_sub(1));
        h.saturating_mul(w).saturating_add(3)
    }

    /// Heads and hidden width of attention pooling.
    pub fn pool_sizes(&self) -> PoolSizes {
        self.pool.unwrap_or(PoolSizes { num_heads: self.num_heads, mlp_hidden: self.mlp_hidden })
    }

    /// Refuses a configuration that no model can have, so that later code may allocate and calculate from it.
    ///
    /// # Errors
    /// The field that is wrong, what is possible, and what was found.
    pub fn validate(&self) -> Result<()> {
        let fail = |why: String| Err(Error::config(why));
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
        self.validate_attention().map_err(Error::config)?;
        if let Some(pre) = &self.pre_logits
            && (pre.size == 0 || pre.size > 1 << 20)
        {
            return fail(format!("`pre_logits` must have a size of 1 to {}, found {}", 1 << 20, pre.size));
        }
        Ok(())
    }

    /// What [`validate`](Self::validate) requires of positions, of k and v, and of attention pooling.
    fn validate_attention(&self) -> Result<(), String> {
        let standard = matches!(self.block, BlockKind::Standard | BlockKind::ResPost);
        let special = self.rope.is_some()
            || self.rel_pos_bias != RelPosBias::None
            || self.split_qkv
            || self.no_k_bias
            || !self.kv_heads.is_empty();
        if special && (!standard || self.diff_attn) {
            return Err("positions in the attention and q, k and v apart need a block of one plain attention".into());
        }
        if let Some(rope) = &self.rope {
            if !self.head_dim().is_multiple_of(4) {
                let width = self.head_dim();
                return Err(format!("`rope` needs heads with a multiple of 4 channels, found {width}"));
            }
            if !(rope.temperature.is_finite() && rope.temperature > 0.0 && rope.grid_offset.abs() < 1e6) {
                return Err("`rope` needs a positive `temperature` and a finite `grid_offset`".into());
            }
            if rope.ref_grid.is_some_and(|grid| grid.iter().any(|side| *side == 0 || *side > 16384)) {
                return Err(format!("`rope.ref_grid` must be between 1 and 16384, found {:?}", rope.ref_grid));
            }
        }
        if self.rel_pos_bias != RelPosBias::None {
            if self.num_prefix_tokens() != 1 || !self.class_token {
                return Err("`rel_pos_bias` needs a class token and no other prefix token".into());
            }
            // every block reads N² biases per head
            if self.num_patches() > 1 << 14 {
                return Err(format!("`rel_pos_bias` of {} patches, at most 16384 are supported", self.num_patches()));
            }
        }
        if !self.kv_heads.is_empty() {
            let fits = |heads: &usize| *heads > 0 && self.num_heads.is_multiple_of(*heads);
            if self.kv_heads.len() != self.depth || !self.kv_heads.iter().all(fits) || !self.split_qkv {
                return Err(format!(
                    "`kv_heads` must have a divisor of `num_heads` {} for each of {} blocks, and `split_qkv` must be set",
                    self.num_heads, self.depth
                ));
            }
        }
        if let Some(pool) = self.pool {
            let fits = pool.num_heads > 0 && self.embed_dim.is_multiple_of(pool.num_heads);
            if !fits || pool.mlp_hidden == 0 || pool.mlp_hidden > 1 << 20 {
                return Err(format!(
                    "`pool` must have heads that divide {} and an MLP, found {pool:?}",
                    self.embed_dim
                ));
            }
        }
        Ok(())
    }
}

/// Whether a field is left out of the JSON.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_switches_are_those_that_a_plain_model_leaves_out() {
        assert!(Config::default().later_switches().is_empty());
        // `qk_norm` is one of the first switches
        let config = Config { qk_norm: true, diff_attn: true, norm: NormKind::RmsNorm, ..Config::default() };
        let mut found = config.later_switches();
        found.sort();
        assert_eq!(found, ["diff_attn", "norm"]);
    }
}

//! The names that transformers' classes give to the tensors of a Vision Transformer.

use crate::MlpKind;

/// How one family of classes names its tensors, each within the tower. A pair is our name and theirs, both without `.weight`
/// and `.bias`.
pub(super) struct Naming {
    /// The patch embedding.
    pub patch: &'static str,
    /// The position embeddings.
    pub positions: &'static str,
    /// The norm after the last block.
    pub norm: &'static str,
    /// The blocks, before their number.
    pub layers: &'static str,
    /// Queries, keys and values, which are one linear layer of ours.
    pub qkv: [&'static str; 3],
    /// What else is in a block, except for the first layer of the MLP.
    pub block: [(&'static str, &'static str); 3],
    /// The scales of a block, which have no bias.
    pub scales: [(&'static str, &'static str); 2],
    /// The two layers of the MLP.
    mlp: [&'static str; 2],
    /// The two layers of a gated MLP.
    gated: [&'static str; 2],
}

impl Naming {
    /// The two layers of the MLP, theirs for our `mlp.fc1` and `mlp.fc2`.
    pub fn mlp(&self, kind: MlpKind) -> [&'static str; 2] {
        if kind == MlpKind::Mlp { self.mlp } else { self.gated }
    }
}

/// ViT, ViT-MAE, ViT-MSN, I-JEPA and DeiT.
pub(super) const VIT: Naming = Naming {
    patch: "embeddings.patch_embeddings.projection",
    positions: "embeddings.position_embeddings",
    norm: "layernorm",
    layers: "encoder.layer",
    qkv: ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    block: [("norm1", "layernorm_before"), ("attn.proj", "attention.output.dense"), ("norm2", "layernorm_after")],
    mlp: ["intermediate.dense", "output.dense"],
    gated: ["intermediate.dense", "output.dense"],
    scales: [("ls1.gamma", "layer_scale1.lambda1"), ("ls2.gamma", "layer_scale2.lambda1")],
};

/// DINOv2, with and without registers.
pub(super) const DINOV2: Naming = Naming {
    block: [("norm1", "norm1"), ("attn.proj", "attention.output.dense"), ("norm2", "norm2")],
    mlp: ["mlp.fc1", "mlp.fc2"],
    gated: ["mlp.weights_in", "mlp.weights_out"],
    ..VIT
};

/// The vision towers of CLIP and SigLIP.
pub(super) const TOWER: Naming = Naming {
    patch: "embeddings.patch_embedding",
    positions: "embeddings.position_embedding.weight",
    norm: "post_layernorm",
    layers: "encoder.layers",
    qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    block: [("norm1", "layer_norm1"), ("attn.proj", "self_attn.out_proj"), ("norm2", "layer_norm2")],
    mlp: ["mlp.fc1", "mlp.fc2"],
    gated: ["mlp.fc1", "mlp.fc2"],
    ..VIT
};

/// DINOv3. Its gated MLP has a layer for the gate, which is named beside these two.
pub(super) const DINOV3: Naming = Naming {
    patch: "embeddings.patch_embeddings",
    norm: "norm",
    layers: "layer",
    qkv: ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    block: [("norm1", "norm1"), ("attn.proj", "attention.o_proj"), ("norm2", "norm2")],
    mlp: ["mlp.up_proj", "mlp.down_proj"],
    gated: ["mlp.up_proj", "mlp.down_proj"],
    ..VIT
};

/// DINOv3's encoder as the newer versions of transformers name it.
pub(super) const DINOV3_MODEL: Naming = Naming { layers: "model.layer", ..DINOV3 };

/// BEiT and data2vec-vision.
pub(super) const BEIT: Naming = Naming { scales: [("ls1.gamma", "lambda_1"), ("ls2.gamma", "lambda_2")], ..VIT };

/// SigLIP's attention pooling, whose queries, keys and values are one linear layer of theirs.
pub(super) const POOL: [(&str, &str); 4] = [
    ("attn_pool.proj", "head.attention.out_proj"),
    ("attn_pool.norm", "head.layernorm"),
    ("attn_pool.mlp.fc1", "head.mlp.fc1"),
    ("attn_pool.mlp.fc2", "head.mlp.fc2"),
];

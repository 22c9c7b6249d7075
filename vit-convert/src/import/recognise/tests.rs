//! Small models put together by hand: what is recognised in them, and with which words a near miss is refused.

use vit_model::config::{Activation, Config, MlpKind, Pool};

use super::*;
use crate::import::axes::{self, Digit};
use crate::import::expr::{Func, Number, PoolKind};
use crate::onnx::graph::DType;

/// Larger than any other size, as a dynamic batch is.
const BATCH: usize = 1009;
const WIDTH: usize = 6;
const PATCHES: usize = 6;

/// Expressions of one model; every weight is different.
struct Builder {
    x: Exprs,
    made: usize,
    heads: usize,
    eps: f64,
    act: Activation,
    hidden: usize,
}

impl Builder {
    fn new() -> Self {
        Self { x: Exprs::new(1e-5), made: 0, heads: 2, eps: 1e-6, act: Activation::Gelu, hidden: 10 }
    }

    fn array(&mut self, dims: &[usize]) -> Array {
        self.made += 1;
        let n: usize = dims.iter().product();
        let values: Vec<f64> = (0..n).map(|i| (self.made * 1000 + i) as f64).collect();
        Array::floats(DType::F32, dims, &values)
    }

    fn linear(&mut self, e: Id, out: usize, bias: bool) -> Id {
        let weight = self.array(&[out, self.x.shape(e)[2]]);
        let bias = bias.then(|| self.array(&[out]).into());
        self.x.linear(e, weight, bias)
    }

    fn norm(&mut self, e: Id) -> Id {
        self.grouped_norm(e, self.x.shape(e)[2])
    }

    fn grouped_norm(&mut self, e: Id, group: usize) -> Id {
        let (gain, bias) = (Some(self.array(&[group]).into()), Some(self.array(&[group]).into()));
        let shape = self.x.shape(e).to_vec();
        self.x.make(Op::Norm { eps: Number(self.eps), gain, bias, group }, vec![e], shape)
    }

    /// The image as patches, with positions or without.
    fn patches(&mut self, pos: bool) -> Id {
        let image = self.x.make(Op::Input, vec![], vec![BATCH, 3, 8, 12]);
        let (weight, bias) = (self.array(&[WIDTH, 3, 4, 4]).into(), Some(self.array(&[WIDTH]).into()));
        let op = Op::Patch { weight, bias, grid: [2, 3], channels: Channels::First, pixels: vec![] };
        let e = self.x.make(op, vec![image], vec![BATCH, PATCHES, WIDTH]);
        if pos { self.positioned(e) } else { e }
    }

    fn positioned(&mut self, e: Id) -> Id {
        let table = self.array(&[1, self.x.shape(e)[1], WIDTH]);
        self.x.add_c(e, &table).unwrap()
    }

    fn param(&mut self, tokens: usize) -> Id {
        let array = self.array(&[1, tokens, WIDTH]);
        self.x.make(Op::Param(array.into()), vec![], vec![1, tokens, WIDTH])
    }

    /// Tokens before patches, each with its position.
    fn tokens(&mut self, prefix: usize) -> Id {
        let patches = self.patches(false);
        let all = if prefix == 0 {
            patches
        } else {
            let before = self.param(prefix);
            self.x.cat(vec![before, patches]).unwrap()
        };
        self.positioned(all)
    }

    /// `softmax(scale · q kᵀ) v` before its projection, the norms of q and k given by `norms`.
    fn mixed(&mut self, queries: Id, source: Id, scale: f64, norms: [bool; 2]) -> Id {
        let mut qkv = [queries, source, source].map(|e| self.linear(e, WIDTH, true));
        for (e, normed) in qkv.iter_mut().zip(norms) {
            if normed {
                *e = self.grouped_norm(*e, WIDTH / self.heads);
            }
        }
        let [q, k, v] = qkv;
        let scores = self.x.scores(q, k, self.heads);
        let scaled = self.x.scale(scores, scale);
        let shape = self.x.shape(scaled).to_vec();
        let soft = self.x.make(Op::Softmax, vec![scaled], shape);
        self.x.attention(soft, v, self.heads).unwrap()
    }

    fn head_scale(&self) -> f64 {
        ((WIDTH / self.heads) as f64).powf(-0.5)
    }

    fn attention(&mut self, e: Id) -> Id {
        let scale = self.head_scale();
        let mixed = self.mixed(e, e, scale, [false; 2]);
        self.linear(mixed, WIDTH, true)
    }

    fn mlp(&mut self, e: Id) -> Id {
        let fc1 = self.linear(e, self.hidden, true);
        let act = self.x.act(self.act, fc1);
        self.linear(act, WIDTH, true)
    }

    /// `e + branch(norm(e))`.
    fn residual(&mut self, e: Id, branch: impl FnOnce(&mut Self, Id) -> Id) -> Id {
        let norm = self.norm(e);
        let branch = branch(self, norm);
        self.x.add(e, branch)
    }

    fn block(&mut self, e: Id) -> Id {
        let e = self.residual(e, Self::attention);
        self.residual(e, Self::mlp)
    }

    /// Two blocks over tokens with a prefix.
    fn trunk(&mut self, prefix: usize) -> Id {
        let e = self.tokens(prefix);
        let e = self.block(e);
        self.block(e)
    }

    fn pool(&mut self, e: Id, kind: PoolKind, lo: usize, n: usize) -> Id {
        self.x.make(Op::Pool { kind, lo, n }, vec![e], vec![BATCH, 1, WIDTH])
    }

    /// A view of the whole of an expression, laid out as it is.
    fn view(&self, e: Id) -> View {
        let dims = self.x.shape(e).iter().enumerate().map(|(k, &n)| axes::axis(k as u8, n)).collect();
        View { e, dims, sel: None }
    }

    /// A view of one token.
    fn token(&self, e: Id, at: usize) -> View {
        let View { mut dims, .. } = self.view(e);
        dims.remove(1);
        View { e, dims, sel: Some((at, 1)) }
    }

    fn activation(&mut self, head: Head, e: Id) -> Id {
        let shape = self.x.shape(e).to_vec();
        self.x.make(Op::Out(head), vec![e], shape)
    }
}

type Build = fn(&mut Builder) -> View;
/// Whether the parts are those that were built.
type Check = fn(&Parts) -> bool;

/// Each model is recognised, with what `check` says of it.
fn recognised(cases: &[(&str, Build, Check)]) {
    for (name, build, check) in cases {
        let mut b = Builder::new();
        let view = build(&mut b);
        let parts = parts(&b.x, &view, false, false).unwrap_or_else(|r| panic!("{name}: {}", r.why));
        assert!(check(&parts), "{name}: {:?} {:?} {:?}", parts.config, parts.heads, parts.tensors.keys());
        let wanted: Vec<String> = tensor_names(&parts.config);
        assert_eq!(parts.tensors.keys().cloned().collect::<Vec<_>>(), wanted, "{name}");
    }
}

/// Each model is refused in words that say why.
fn refused(cases: &[(&str, Build)]) {
    for (words, build) in cases {
        let mut b = Builder::new();
        let view = build(&mut b);
        match parts(&b.x, &view, false, false) {
            Ok(parts) => panic!("{words}: recognised as {:?}", parts.config),
            Err(refusal) => assert!(refusal.why.contains(words), "{words}: {}", refusal.why),
        }
    }
}

/// The tensors that a model of this configuration has.
fn tensor_names(config: &Config) -> Vec<String> {
    vit_model::layers::parameters(config).unwrap().into_keys().collect()
}

#[test]
fn the_top_of_a_model() {
    recognised(&[
        (
            "a head over the class token",
            |b| {
                let e = b.trunk(1);
                let e = b.norm(e);
                let logits = b.linear(e, 4, true);
                b.token(logits, 0)
            },
            |p| p.config.num_classes == 4 && p.config.global_pool == Pool::Token && p.heads.is_empty(),
        ),
        (
            "all tokens, no head",
            |b| {
                let e = b.trunk(1);
                let e = b.norm(e);
                b.view(e)
            },
            |p| p.config.num_classes == 0 && p.config.global_pool == Pool::None && p.config.final_norm,
        ),
        (
            "softmax and then the best class",
            |b| {
                let e = b.trunk(1);
                let logits = b.linear(e, 4, false);
                let soft = b.activation(Head::Softmax, logits);
                let best = b.activation(Head::ArgMax, soft);
                let View { dims, .. } = b.view(best);
                View { e: best, dims: dims[..1].to_vec(), sel: Some((0, 1)) }
            },
            |p| p.heads == [Head::Softmax, Head::ArgMax] && !p.config.head_bias,
        ),
        (
            "a sigmoid",
            |b| {
                let e = b.trunk(1);
                let logits = b.linear(e, 4, true);
                let e = b.x.func(Func::Sigmoid, logits);
                b.token(e, 0)
            },
            |p| p.heads == [Head::Sigmoid],
        ),
        (
            "pre_logits",
            |b| {
                let e = b.trunk(1);
                let e = b.norm(e);
                let pre = b.linear(e, 5, true);
                let tanh = b.x.func(Func::Tanh, pre);
                let logits = b.linear(tanh, 4, true);
                b.token(logits, 0)
            },
            |p| p.config.pre_logits.as_ref().is_some_and(|pre| pre.size == 5),
        ),
        ("the mean of two heads", |b| two_heads(b, 2, [0, 1]), |p| p.config.dist_token && p.config.reg_tokens == 0),
    ]);
    refused(&[
        ("two heads over other tokens", |b| two_heads(b, 2, [0, 2])),
        ("two heads need a class and a distillation token", |b| two_heads(b, 3, [0, 1])),
        ("the tokens (1, 1) are read, not the class token", |b| {
            let e = b.trunk(1);
            let logits = b.linear(e, 4, true);
            b.token(logits, 1)
        }),
        ("laid out otherwise than (batch, tokens, classes)", |b| {
            let e = b.trunk(1);
            let View { e, mut dims, sel } = b.view(e);
            dims.swap(1, 2);
            View { e, dims, sel }
        }),
        ("a pile of output activations", |b| {
            let e = b.trunk(1);
            let mut e = b.linear(e, 4, true);
            for _ in 0..6 {
                e = b.activation(Head::Softmax, e);
            }
            b.token(e, 0)
        }),
        ("the first token is read as a class token, and it is a patch", |b| {
            let e = b.trunk(0);
            let logits = b.linear(e, 4, true);
            b.token(logits, 0)
        }),
    ]);
}

fn two_heads(b: &mut Builder, prefix: usize, at: [usize; 2]) -> View {
    let e = b.trunk(prefix);
    let e = b.norm(e);
    let heads = at.map(|at| {
        let logits = b.linear(e, 4, true);
        b.x.select(logits, at, 1).unwrap()
    });
    let sum = b.x.add(heads[0], heads[1]);
    let mean = b.x.scale(sum, 0.5);
    let View { e, mut dims, .. } = b.view(mean);
    dims.remove(1);
    View { e, dims, sel: None }
}

/// The class token and the mean of the patches behind each other, in either order, and a head.
fn beside(b: &mut Builder, mean_first: bool, lo: usize, n: usize) -> View {
    let e = b.trunk(1);
    let e = b.norm(e);
    let (class, mean) = (b.x.select(e, 0, 1).unwrap(), b.pool(e, PoolKind::Mean, lo, n));
    let args = if mean_first { vec![mean, class] } else { vec![class, mean] };
    let e = b.x.make(Op::Beside, args, vec![BATCH, 1, 2 * WIDTH]);
    let logits = b.linear(e, 4, true);
    pooled(b, logits)
}

#[test]
fn a_class_token_beside_the_mean_of_the_patches() {
    let columns = |mean_first: bool| {
        let mut b = Builder::new();
        let view = beside(&mut b, mean_first, 1, PATCHES);
        let parts = parts(&b.x, &view, false, false).unwrap();
        assert_eq!(parts.config.global_pool, Pool::TokenAvg);
        assert!(parts.tensors.keys().eq(&tensor_names(&parts.config)));
        parts.tensors["head.weight"].f64s()
    };
    // timm's order is the class token first; the other order exchanges the halves of the head's columns
    for (row, turned) in columns(false).chunks(2 * WIDTH).zip(columns(true).chunks(2 * WIDTH)) {
        assert_eq!(turned, [&row[WIDTH..], &row[..WIDTH]].concat());
    }
    refused(&[("tokens 2 to 7 are pooled, the patches are 1 to 7", |b| beside(b, false, 2, PATCHES - 1))]);
}

/// A pooled answer: the tokens' axis is gone.
fn pooled(b: &Builder, e: Id) -> View {
    let View { e, mut dims, .. } = b.view(e);
    dims.remove(1);
    View { e, dims, sel: None }
}

#[test]
fn the_pooling() {
    recognised(&[
        (
            "the mean of the patches, and a norm after it",
            |b| {
                let e = b.trunk(1);
                let e = b.pool(e, PoolKind::Mean, 1, PATCHES);
                let e = b.norm(e);
                let logits = b.linear(e, 4, true);
                pooled(b, logits)
            },
            |p| p.config.global_pool == Pool::Avg && p.config.fc_norm && p.config.final_norm,
        ),
        (
            "the largest, and a norm before it",
            |b| {
                let e = b.trunk(0);
                let e = b.norm(e);
                let e = b.pool(e, PoolKind::Max, 0, PATCHES);
                pooled(b, e)
            },
            |p| p.config.global_pool == Pool::Max && !p.config.fc_norm && p.config.final_norm,
        ),
        (
            "the mean of both",
            |b| {
                let e = b.trunk(0);
                let (mean, max) = (b.pool(e, PoolKind::Mean, 0, PATCHES), b.pool(e, PoolKind::Max, 0, PATCHES));
                let sum = b.x.add(mean, max);
                let e = b.x.scale(sum, 0.5);
                pooled(b, e)
            },
            |p| p.config.global_pool == Pool::Avgmax,
        ),
        (
            "attention pooling",
            |b| map_pooled(b, None, None),
            |p| p.config.global_pool == Pool::Map && p.tensors["attn_pool.kv.weight"].shape() == [2 * WIDTH, WIDTH],
        ),
    ]);
    refused(&[
        ("tokens 0 to 6 are pooled, the patches are 1 to 7", |b| {
            let e = b.trunk(1);
            let e = b.pool(e, PoolKind::Mean, 0, PATCHES);
            pooled(b, e)
        }),
        ("a norm before and one after the pooling", |b| {
            let e = b.trunk(0);
            let e = b.norm(e);
            let e = b.pool(e, PoolKind::Mean, 0, PATCHES);
            let e = b.norm(e);
            pooled(b, e)
        }),
        // the mean of a mean and a maximum of other tokens is no pooling that timm has
        ("this is not a pre-norm transformer block", |b| {
            let e = b.trunk(0);
            let (mean, max) = (b.pool(e, PoolKind::Mean, 0, PATCHES), b.pool(e, PoolKind::Max, 1, PATCHES - 1));
            let sum = b.x.add(mean, max);
            let e = b.x.scale(sum, 0.5);
            pooled(b, e)
        }),
        ("attention pooling without a scale", |b| map_pooled(b, Some(1.0), None)),
        ("3 heads in the pooling, 2 in the blocks", |b| {
            let e = b.trunk(0);
            b.heads = 3;
            map_over(b, e, None)
        }),
        ("the pooling's MLP is 8 wide, 10 is expected", |b| map_pooled(b, None, Some(8))),
    ]);
}

fn map_pooled(b: &mut Builder, scale: Option<f64>, hidden: Option<usize>) -> View {
    let e = b.trunk(0);
    b.hidden = hidden.unwrap_or(b.hidden);
    map_over(b, e, scale)
}

fn map_over(b: &mut Builder, e: Id, scale: Option<f64>) -> View {
    let (e, latent, scale) = (b.norm(e), b.param(1), scale.unwrap_or(b.head_scale()));
    let mixed = b.mixed(latent, e, scale, [false; 2]);
    let y = b.linear(mixed, WIDTH, true);
    let e = b.residual(y, Builder::mlp);
    pooled(b, e)
}

#[test]
fn the_trunk() {
    recognised(&[
        (
            "two blocks",
            |b| {
                let e = b.trunk(1);
                b.view(e)
            },
            |p| {
                let c = &p.config;
                (c.depth, c.num_heads, c.mlp_hidden, c.embed_dim) == (2, 2, 10, WIDTH)
                    && c.qkv_bias
                    && !c.qk_norm
                    && !c.layer_scale
                    && c.ln_eps == 1e-6
                    && p.evidence.iter().map(|e| e.0.as_str()).eq(["ln_eps = 1e-6", "num_heads = 2", "act = Gelu"])
            },
        ),
        (
            "LayerScale",
            |b| layer_scaled(b, [true, true]),
            |p| p.config.layer_scale && p.tensors["blocks.0.ls2.gamma"].shape() == [WIDTH],
        ),
        (
            "qk-norm",
            |b| one_block(b, |b, e| mixed_block(b, e, None, [true, true]), Builder::mlp),
            |p| p.config.qk_norm && p.tensors["blocks.0.attn.q_norm.weight"].shape() == [WIDTH / 2],
        ),
        (
            "the scale folded into q",
            |b| one_block(b, |b, e| mixed_block(b, e, Some(1.0), [false; 2]), Builder::mlp),
            |p| p.rounded.iter().any(|why| why.contains("unfolded")),
        ),
        (
            "a gated MLP of two linears",
            |b| one_block(b, Builder::attention, gated),
            |p| p.config.mlp == MlpKind::Swiglu && p.config.act == Activation::Silu && p.config.mlp_hidden == 10,
        ),
    ]);
    refused(&[
        ("block 0 has one residual branch, two are expected", |b| {
            let e = b.tokens(1);
            let e = b.residual(e, Builder::attention);
            b.view(e)
        }),
        ("block 0 is not attention and then an MLP", |b| one_block(b, Builder::mlp, Builder::attention)),
        ("the blocks differ", |b| {
            let e = b.trunk(1);
            b.hidden = 12;
            let e = b.block(e);
            b.view(e)
        }),
        ("the activations differ: Gelu and Relu", |b| {
            let e = b.trunk(1);
            b.act = Activation::Relu;
            let e = b.block(e);
            b.view(e)
        }),
        ("the norms differ in epsilon: 1e-6, 1e-5", |b| {
            let e = b.trunk(1);
            b.eps = 1e-5;
            let e = b.norm(e);
            b.view(e)
        }),
        ("an epsilon of 2e0", |b| {
            b.eps = 2.0;
            let e = b.trunk(1);
            b.view(e)
        }),
        ("the attention scale is 0.600000, not head_dim^-0.5 = 0.577350", |b| {
            one_block(b, |b, e| mixed_block(b, e, Some(0.6), [false; 2]), Builder::mlp)
        }),
        // without a scale a norm of q would undo what was folded into q's weights
        ("the attention scale is 1.000000", |b| {
            one_block(b, |b, e| mixed_block(b, e, Some(1.0), [true; 2]), Builder::mlp)
        }),
        ("only one of q and k is normed", |b| {
            one_block(b, |b, e| mixed_block(b, e, None, [true, false]), Builder::mlp)
        }),
        ("only one branch of block 0 has a LayerScale", |b| layer_scaled(b, [true, false])),
        ("a norm over 3 of 6 channels where one over all is expected", |b| {
            let e = b.trunk(1);
            let e = b.grouped_norm(e, 3);
            b.view(e)
        }),
        // a branch that reads its input without a norm
        ("this is not a pre-norm transformer block", |b| {
            let e = b.tokens(1);
            let branch = b.attention(e);
            let e = b.x.add(e, branch);
            b.view(e)
        }),
    ]);
}

/// Blocks of which each has its own biases: of q, k and v together, the projection, fc1 and fc2.
fn biased_trunk(b: &mut Builder, blocks: &[[bool; 4]]) -> View {
    let mut e = b.tokens(1);
    for &[qkv, proj, fc1, fc2] in blocks {
        e = b.residual(e, |b, e| {
            let [q, k, v] = [e; 3].map(|e| b.linear(e, WIDTH, qkv));
            let scores = b.x.scores(q, k, b.heads);
            let scaled = b.x.scale(scores, b.head_scale());
            let shape = b.x.shape(scaled).to_vec();
            let soft = b.x.make(Op::Softmax, vec![scaled], shape);
            let mixed = b.x.attention(soft, v, b.heads).unwrap();
            b.linear(mixed, WIDTH, proj)
        });
        e = b.residual(e, |b, e| {
            let hidden = b.linear(e, b.hidden, fc1);
            let act = b.x.act(b.act, hidden);
            b.linear(act, WIDTH, fc2)
        });
    }
    b.view(e)
}

/// `recognised` compares the names with those of timm's model; what no block has, timm's switches leave out.
#[test]
fn any_bias_may_be_absent_in_any_block() {
    let zero = |p: &Parts, name: &str| p.tensors[name].uniform() == Some(0.0);
    for k in 0..256usize {
        let bits: Vec<bool> = (0..8).map(|at| k >> at & 1 == 1).collect();
        let blocks = [[bits[0], bits[1], bits[2], bits[3]], [bits[4], bits[5], bits[6], bits[7]]];
        let mut b = Builder::new();
        let view = biased_trunk(&mut b, &blocks);
        let parts = parts(&b.x, &view, false, false).unwrap_or_else(|r| panic!("{blocks:?}: {}", r.why));
        let (qkv, proj) = (blocks.iter().any(|b| b[0]), blocks.iter().any(|b| b[1] || b[2] || b[3]));
        assert_eq!((parts.config.qkv_bias, parts.config.proj_bias), (qkv, proj), "{blocks:?}");
        assert!(parts.tensors.keys().eq(&tensor_names(&parts.config)), "{blocks:?}");
        for (at, block) in blocks.iter().enumerate() {
            for (name, has) in ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"].iter().zip(block) {
                let name = format!("blocks.{at}.{name}.bias");
                assert!(!parts.tensors.contains_key(&name) || zero(&parts, &name) != *has, "{blocks:?}: {name}");
            }
        }
    }
}

#[test]
fn a_norm_may_have_a_bias_without_a_weight() {
    let mut b = Builder::new();
    let e = b.trunk(1);
    let shape = b.x.shape(e).to_vec();
    let bare = b.x.make(Op::Norm { eps: Number(1e-6), gain: None, bias: None, group: WIDTH }, vec![e], shape);
    let bias = b.array(&[1, 1, WIDTH]);
    let e = b.x.add_c(bare, &bias).unwrap();
    let view = b.view(e);
    let parts = parts(&b.x, &view, false, false).unwrap();
    assert_eq!(parts.tensors["norm.weight"].uniform(), Some(1.0));
    assert_eq!(parts.tensors["norm.bias"].f64s(), bias.f64s());
}

fn one_block(
    b: &mut Builder,
    first: impl FnOnce(&mut Builder, Id) -> Id,
    second: impl FnOnce(&mut Builder, Id) -> Id,
) -> View {
    let e = b.tokens(1);
    let e = b.residual(e, first);
    let e = b.residual(e, second);
    b.view(e)
}

/// Attention with a scale of its own, and norms of q and k.
fn mixed_block(b: &mut Builder, e: Id, scale: Option<f64>, norms: [bool; 2]) -> Id {
    let scale = scale.unwrap_or(b.head_scale());
    let mixed = b.mixed(e, e, scale, norms);
    b.linear(mixed, WIDTH, true)
}

fn gated(b: &mut Builder, e: Id) -> Id {
    let (gate, value) = (b.linear(e, b.hidden, true), b.linear(e, b.hidden, true));
    let act = b.x.act(Activation::Silu, gate);
    let product = b.x.mul(act, value);
    b.linear(product, WIDTH, true)
}

fn layer_scaled(b: &mut Builder, [first, second]: [bool; 2]) -> View {
    fn scaled(b: &mut Builder, e: Id, on: bool) -> Id {
        let gamma = b.array(&[1, 1, WIDTH]);
        if on { b.x.mul_c(e, &gamma) } else { e }
    }
    one_block(
        b,
        |b, e| {
            let e = b.attention(e);
            scaled(b, e, first)
        },
        |b, e| {
            let e = b.mlp(e);
            scaled(b, e, second)
        },
    )
}

/// A block over an embedding, all tokens read.
fn over(b: &mut Builder, e: Id) -> View {
    let e = b.block(e);
    b.view(e)
}

#[test]
fn the_embedding() {
    recognised(&[
        (
            "patches alone",
            |b| {
                let e = b.patches(true);
                over(b, e)
            },
            |p| {
                let c = &p.config;
                (c.img_size, c.patch_size, c.in_chans) == ([8, 12], [4, 4], 3)
                    && !c.class_token
                    && c.pos_embed
                    && c.patch_bias
            },
        ),
        (
            "no positions",
            |b| {
                let e = b.patches(false);
                over(b, e)
            },
            |p| !p.config.pos_embed,
        ),
        (
            "a class token and three registers, all with positions",
            |b| {
                let e = b.tokens(4);
                over(b, e)
            },
            |p| {
                let c = &p.config;
                c.class_token
                    && c.reg_tokens == 3
                    && !c.no_embed_class
                    && p.tensors["pos_embed"].shape() == [1, 4 + PATCHES, WIDTH]
            },
        ),
        (
            "positions of the patches alone",
            |b| {
                let (class, patches) = (b.param(1), b.patches(true));
                let e = b.x.cat(vec![class, patches]).unwrap();
                over(b, e)
            },
            |p| p.config.no_embed_class && p.tensors["pos_embed"].shape() == [1, PATCHES, WIDTH],
        ),
        (
            "a norm before the blocks",
            |b| {
                let e = b.tokens(1);
                let e = b.norm(e);
                over(b, e)
            },
            |p| p.config.pre_norm,
        ),
        (
            "pixels that the graph normalises go into the weights",
            |b| {
                let image = b.x.make(Op::Input, vec![], vec![BATCH, 3, 8, 12]);
                let pixels = vec![(Number(2.0), Number(-1.0)); 3];
                let weight = b.array(&[WIDTH, 3, 4, 4]).into();
                let op = Op::Patch { weight, bias: None, grid: [2, 3], channels: Channels::First, pixels };
                let e = b.x.make(op, vec![image], vec![BATCH, PATCHES, WIDTH]);
                over(b, e)
            },
            |p| {
                // made first: 1000, 1001, … ; twice that, and minus the sum of a filter
                let (weight, bias) = (&p.tensors["patch_embed.proj.weight"], &p.tensors["patch_embed.proj.bias"]);
                let sum: f64 = (1000..1048).map(f64::from).sum();
                p.pixels == [(2.0, -1.0); 3] && weight.f64s()[..2] == [2000.0, 2002.0] && bias.f64s()[0] == -sum
            },
        ),
    ]);
    refused(&[
        ("the patches have none", |b| {
            let (class, patches) = (b.param(1), b.patches(false));
            let class = b.positioned(class);
            let e = b.x.cat(vec![class, patches]).unwrap();
            over(b, e)
        }),
        ("some of the tokens before the patches have a position and some have not", |b| {
            let (class, register, patches) = (b.param(1), b.param(1), b.patches(true));
            let register = b.positioned(register);
            let e = b.x.cat(vec![class, register, patches]).unwrap();
            over(b, e)
        }),
        ("a token before the patches that is no parameter", |b| {
            let (class, patches) = (b.param(1), b.patches(true));
            let class = b.linear(class, WIDTH, true);
            let e = b.x.cat(vec![class, patches]).unwrap();
            over(b, e)
        }),
        ("the tokens do not come from a patch embedding of the image", |b| {
            let patches = b.patches(true);
            let e = b.linear(patches, WIDTH, true);
            over(b, e)
        }),
        ("a token for each image of the batch", |b| {
            let array = b.array(&[2, 1, WIDTH]);
            let class = b.x.make(Op::Param(array.into()), vec![], vec![2, 1, WIDTH]);
            let patches = b.patches(true);
            let e = b.x.cat(vec![class, patches]).unwrap();
            over(b, e)
        }),
    ]);
}

#[test]
fn bytes_keep_their_normalisation_for_preprocessing() {
    let mut b = Builder::new();
    let image = b.x.make(Op::Input, vec![], vec![BATCH, 3, 8, 12]);
    let weight = b.array(&[WIDTH, 3, 4, 4]);
    let pixels = vec![(Number(0.01), Number(-1.0)); 3];
    let op = Op::Patch { weight: weight.clone().into(), bias: None, grid: [2, 3], channels: Channels::First, pixels };
    let e = b.x.make(op, vec![image], vec![BATCH, PATCHES, WIDTH]);
    let view = over(&mut b, e);
    let found = parts(&b.x, &view, false, true).unwrap();
    assert!(found.tensors["patch_embed.proj.weight"] == weight && !found.config.patch_bias);
    assert_eq!(found.pixels, [(0.01, -1.0); 3]);
}

#[test]
fn a_gate_beside_its_value_in_the_file_is_packed() {
    let mut b = Builder::new();
    let both = b.array(&[2 * b.hidden, WIDTH]);
    let e = b.tokens(1);
    let e = b.residual(e, Builder::attention);
    let e = b.residual(e, |b, e| {
        let all = b.x.linear(e, both, None);
        let halves = [0, b.hidden].map(|at| {
            let pick = crate::import::axes::Pick::range(at, b.hidden);
            b.x.take(all, &pick).unwrap()
        });
        let act = b.x.act(Activation::Silu, halves[0]);
        let product = b.x.mul(act, halves[1]);
        b.linear(product, WIDTH, true)
    });
    let view = b.view(e);
    b.act = Activation::Silu;
    let found = parts(&b.x, &view, false, false).unwrap();
    assert_eq!((found.config.mlp, found.config.mlp_hidden), (MlpKind::SwigluPacked, 20));
}

/// Heads that are cut from channels in another order are other heads.
#[test]
fn an_output_of_several_digits_is_refused() {
    let mut b = Builder::new();
    let e = b.trunk(1);
    let mut view = b.view(e);
    view.dims[2] = vec![Digit { axis: 2, stride: 1, size: 2 }, Digit { axis: 2, stride: 2, size: 3 }];
    assert!(parts(&b.x, &view, false, false).unwrap_err().why.contains("laid out otherwise"));
}

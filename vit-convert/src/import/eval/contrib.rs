//! The fused operators that ONNX Runtime's optimisers write (`com.microsoft`).

use vit_model::config::Activation;

use super::call::Call;
use super::value::{Rule, Value, View, need};
use super::walk::Walk;
use crate::import::expr::{Func, Op};

impl Walk<'_> {
    pub(super) fn microsoft(&mut self, call: &Call<'_>) -> Rule {
        let one = |v: Rule<Value>| v.map(|v| vec![v]);
        match call.node.op.as_str() {
            "Attention" => one(self.ms_attention(call)),
            "MultiHeadAttention" => one(self.multi_head(call)),
            "SkipLayerNormalization" => self.skip_layer_norm(call),
            "Gelu" => one(self.activate(Activation::Gelu, call.get(0))),
            "BiasGelu" => one(self.biased(call, Activation::Gelu)),
            "FastGelu" => one(self.biased(call, Activation::GeluTanh)),
            "QuickGelu" => {
                let alpha = call.float("alpha", 1.702)?;
                if self.x.near(alpha, 1.0) {
                    return one(self.activate(Activation::Silu, call.get(0)));
                }
                need!(self.x.near(alpha, 1.702), "QuickGelu with alpha {alpha} is not x · sigmoid(1.702 x)");
                one(self.activate(Activation::QuickGelu, call.get(0)))
            }
            "BiasAdd" => {
                let sum = self.binary("Add", call.get(0), call.get(1))?;
                one(self.binary("Add", &sum, call.get(2)))
            }
            "FusedMatMul" | "TransposeMatMul" => one(self.fused_matmul(call)),
            "FusedGemm" => one(self.fused_gemm(call)),
            "MatMulNBits" => one(self.matmul_nbits(call)),
            "QLinearAdd" | "QLinearMul" => one(self.qlinear_binary(call)),
            "QLinearSigmoid" | "QLinearSoftmax" | "QLinearGlobalAveragePool" | "QLinearReduceMean" => {
                one(self.qlinear_unary(call))
            }
            "QLinearConcat" => one(self.qlinear_concat(call)),
            "QGemm" => one(self.qgemm(call)),
            "QAttention" => Err("com.microsoft.QAttention: quantise with the attention left unfused".into()),
            "DynamicQuantizeMatMul" => one(self.dynamic_matmul(call)),
            "MatMulIntegerToFloat" => one(self.integer_to_float(call)),
            "QuantizeLinear" => one(self.quantize(call)),
            "DequantizeLinear" => one(self.dequantize(call)),
            "SimplifiedLayerNormalization" | "SkipSimplifiedLayerNormalization" => {
                Err("RMSNorm in place of LayerNorm: not a ViT of the family that is converted".into())
            }
            op => Err(format!("com.microsoft.{op} is not known here: optimise with fewer fusions")),
        }
    }

    /// An activation, after a bias that may be absent.
    fn biased(&mut self, call: &Call<'_>, act: Activation) -> Rule<Value> {
        let x = if call.has(1) { self.binary("Add", call.get(0), call.get(1))? } else { call.get(0).clone() };
        self.activate(act, &x)
    }

    fn skip_layer_norm(&mut self, call: &Call<'_>) -> Rule {
        let (mut a, mut b) = (call.get(0).clone(), call.get(1).clone());
        if call.has(4) {
            // the bias belongs to the bare linear among the two
            let bare =
                |v: &Value| matches!(v, Value::View(v) if matches!(self.x.op(v.e), Op::Linear { bias: None, .. }));
            if bare(&a) {
                a = self.binary("Add", &a, call.get(4))?;
            } else {
                b = self.binary("Add", &b, call.get(4))?;
            }
        }
        let sum = self.binary("Add", &a, &b)?;
        let v = sum.view("the operand")?.clone();
        need!(v.rank() > 0, "a norm of a scalar");
        let gain = call.get(2).array("gamma")?;
        let beta = if call.has(3) { Some(call.get(3).array("beta")?) } else { None };
        let eps = call.float("epsilon", 1e-12)?;
        let out: View = self.normed(&v, &[v.rank() - 1], eps, Some(gain), beta)?;
        Ok(vec![out.into(), Value::None, Value::None, sum])
    }

    fn fused_matmul(&mut self, call: &Call<'_>) -> Rule<Value> {
        need!(call.int("transBatchA", 0)? == 0 && call.int("transBatchB", 0)? == 0, "FusedMatMul with transBatch");
        let mut operands = [call.get(0).clone(), call.get(1).clone()];
        for (v, name) in operands.iter_mut().zip(["transA", "transB"]) {
            if call.int(name, 0)? == 0 {
                continue;
            }
            let rank = v.shape()?.len();
            need!(rank >= 2, "FusedMatMul of rank {rank}");
            let mut perm: Vec<usize> = (0..rank).collect();
            perm.swap(rank - 1, rank - 2);
            *v = match &*v {
                Value::Const(c) => c.array.transpose(&perm).into(),
                other => {
                    let v = other.view("an operand")?;
                    v.with(perm.iter().map(|&p| v.dims[p].clone()).collect()).into()
                }
            };
        }
        let product = self.matmul(&operands[0], &operands[1])?;
        let v = product.view("the product")?.clone();
        let e = self.x.scale(v.e, call.float("alpha", 1.0)?);
        Ok(v.of(e).into())
    }

    fn fused_gemm(&mut self, call: &Call<'_>) -> Rule<Value> {
        let product = self.gemm(call)?;
        match call.text("activation", "")?.as_str() {
            "" => Ok(product),
            "Relu" => self.activate(Activation::Relu, &product),
            "Tanh" => {
                let v = product.view("the product")?.clone();
                Ok(v.of(self.x.func(Func::Tanh, v.e)).into())
            }
            other => Err(format!("FusedGemm with activation {other}")),
        }
    }
}

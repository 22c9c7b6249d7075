//! Expressions as text, for the message of a refusal.

use super::op::{Id, Op};
use super::table::Exprs;

impl Exprs {
    /// A canonical expression as text, a few levels deep, for a message.
    pub fn show(&self, id: Id, depth: usize) -> String {
        let e = self.get(id);
        let name = match &e.op {
            Op::Patch { weight, .. } => format!("Patch{:?}", weight.shape()),
            Op::Param(v) => format!("Param{:?}", v.shape()),
            Op::Linear { weight, bias } => {
                format!("Linear{:?}{}", weight.shape(), if bias.is_some() { "+b" } else { "" })
            }
            Op::AddC(c) => format!("AddC{:?}", c.shape()),
            Op::MulC(c) => format!("MulC{:?}", c.shape()),
            Op::Norm { eps, group, .. } => format!("Norm(eps {:.3e}, {group})", eps.0),
            Op::Scale(s) => format!("Scale({})", s.0),
            Op::AddS(s) => format!("AddS({})", s.0),
            Op::Pow(s) => format!("Pow({})", s.0),
            Op::IntLinear { .. } => "IntLinear".into(),
            Op::IntPatch { .. } => "IntPatch".into(),
            other => format!("{other:?}").replace("Number", ""),
        };
        if e.args.is_empty() {
            return name;
        }
        if depth == 0 {
            return format!("{name}(…)");
        }
        let args: Vec<String> = e.args.iter().map(|&a| self.show(a, depth - 1)).collect();
        format!("{name}({})", args.join(", "))
    }
}

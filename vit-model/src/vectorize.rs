//! Loops that are compiled once for each set of vector instructions, and picked when they run.

use pulp::{Arch, NullaryFnOnce};

/// Runs the version of an operation that was compiled for this CPU's vector instructions. Everything that it calls has to be
/// inlined into it.
pub(crate) fn dispatch(op: impl NullaryFnOnce<Output = ()>) {
    // without pulp's feature `x86-v3`, which gemm does not enable, `Arch` supports AVX-512 but not AVX2
    #[cfg(target_arch = "x86_64")]
    if let (Arch::Scalar, Some(avx2)) = (Arch::new(), pulp::x86::V3::try_new()) {
        return avx2.vectorize(op);
    }
    Arch::new().dispatch(op);
}

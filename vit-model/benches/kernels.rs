//! Times each step of a ViT-B/16 block on every kernel and precision that this CPU has: `cargo bench -p vit-model`.
//!
//! Rows are the tokens of one image (197) and of eight (1576); `VIT_THREADS` sets the threads (default: the physical cores).
//! A name is `kernel-precision/step/rows`, as in `cargo bench -p vit-model -- amx-bf16/`.

// criterion's macro makes a public function without documentation
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vit_model::cpu::bench::{Step, Steps};
use vit_model::cpu::{Isa, Precision, physical_cores};

const MODEL: &str = "vit_base_patch16_224";

fn kernels(criterion: &mut Criterion) {
    let threads = std::env::var("VIT_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or_else(physical_cores);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        for precision in Precision::ALL {
            let mut group = criterion.benchmark_group(format!("{isa}-{precision}"));
            for images in [1, 8] {
                let steps = Steps::new(MODEL, images, isa, precision, threads).expect("a kernel that is available");
                let Some(steps) = steps else { continue }; // another kernel runs it
                for step in Step::ALL {
                    group.throughput(Throughput::Elements(steps.flops(step)));
                    let id = BenchmarkId::new(format!("{step:?}").to_lowercase(), steps.rows());
                    group.bench_function(id, |bencher| bencher.iter(|| steps.run(step)));
                }
            }
            group.finish();
        }
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);

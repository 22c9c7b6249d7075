//! Times each step of a ViT-B/16 block on every kernel and precision that this CPU has: `cargo bench -p vit-model`.
//!
//! Rows are the tokens of one image (197) and of eight (1576); `VIT_THREADS` sets the threads (default: the physical cores).
//! An argument chooses by name, `kernel-precision/step/rows`, as in `cargo bench -p vit-model -- amx-bf16/`. Without `--bench`,
//! which `cargo bench` passes, each step runs once.

use std::time::{Duration, Instant};

use vit_model::engine::bench::{Step, Steps};
use vit_model::engine::physical_cores;
use vit_model::{Isa, Precision};

const MODEL: &str = "vit_base_patch16_224";
/// How long a step is timed; its median is then within some per cent from run to run.
const TIME: Duration = Duration::from_secs(1);

fn main() {
    let measured = std::env::args().any(|arg| arg == "--bench");
    let chosen = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let threads = std::env::var("VIT_THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or_else(physical_cores);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
        for precision in Precision::CPU {
            for images in [1, 8] {
                let steps = Steps::new(MODEL, images, isa, precision, threads).expect("a kernel that is available");
                let Some(mut steps) = steps else { continue }; // another kernel runs it
                for step in Step::ALL {
                    let name = format!("{isa}-{precision}/{}/{}", format!("{step:?}").to_lowercase(), steps.rows());
                    if name.contains(&chosen) {
                        time(&name, &mut steps, step, measured);
                    }
                }
            }
        }
    }
}

/// Prints the median and the fastest time of a step, and the speed that the median is.
fn time(name: &str, steps: &mut Steps, step: Step, measured: bool) {
    steps.run(step); // fills the caches
    let (start, mut times) = (Instant::now(), Vec::new());
    while times.is_empty() || (measured && start.elapsed() < TIME) {
        let before = Instant::now();
        steps.run(step);
        times.push(before.elapsed().as_secs_f64());
    }
    times.sort_unstable_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!(
        "{name:32} {:10.1} µs   fastest {:10.1} µs   {:8.1} GFLOP/s",
        median * 1e6,
        times[0] * 1e6,
        steps.flops(step) as f64 / median / 1e9
    );
}

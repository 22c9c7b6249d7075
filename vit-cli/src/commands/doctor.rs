//! `doctor`: what this build and this machine have, and what would make models faster.

use std::fmt::Write as _;

use serde_json::{Value, json};
use vit_model::engine::{hardware_threads, physical_cores, precisions};
#[cfg(feature = "hub")]
use vit_model::hub::{Hub, HubOptions};
use vit_model::{Device, Isa};

use crate::args::DoctorArgs;
use crate::output::{Stdout, escape, json_pretty, show};

/// Variables that change what the programs do.
const VARIABLES: [&str; 9] = [
    "VIT_CPU",
    "VIT_MODEL",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "NO_COLOR",
];

pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let found = examine(args);
    let mut out = Stdout::new();
    out.write(&if args.json { json_pretty(&found.json())? + "\n" } else { found.text() })?;
    out.flush()
}

/// What was found, by topic, and what could be better.
#[derive(Default)]
struct Found {
    facts: Vec<(&'static str, Vec<(String, String)>)>,
    advice: Vec<String>,
}

impl Found {
    fn topic(&mut self, name: &'static str) {
        self.facts.push((name, Vec::new()));
    }

    fn fact(&mut self, name: impl Into<String>, value: impl Into<String>) {
        if let Some((_, facts)) = self.facts.last_mut() {
            facts.push((name.into(), value.into()));
        }
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for (topic, facts) in &self.facts {
            let _ = writeln!(out, "{topic}");
            let width = facts.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
            for (name, value) in facts {
                let _ = writeln!(out, "  {name:width$}  {value}");
            }
            out.push('\n');
        }
        if self.advice.is_empty() {
            out += "Nothing here makes models slower than they need be.\n";
        }
        for advice in &self.advice {
            let _ = writeln!(out, "- {advice}");
        }
        out
    }

    fn json(&self) -> Value {
        let topic = |facts: &[(String, String)]| -> Value {
            facts
                .iter()
                .map(|(name, value)| (name.clone(), Value::from(value.clone())))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let mut all: serde_json::Map<String, Value> =
            self.facts.iter().map(|(name, facts)| ((*name).to_owned(), topic(facts))).collect();
        all.insert("advice".into(), json!(self.advice));
        all.into()
    }
}

fn examine(args: &DoctorArgs) -> Found {
    let mut found = Found::default();
    build(&mut found);
    cpu(&mut found);
    gpu(&mut found);
    #[cfg(feature = "hub")]
    hub(&mut found, args.offline);
    #[cfg(not(feature = "hub"))]
    let _ = args;
    let set = VARIABLES.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    found.topic("environment");
    for (name, value) in set {
        // a token is a secret
        found.fact(name, if name == "HF_TOKEN" { "(set)".into() } else { show(value) });
    }
    if found.facts.last().is_some_and(|(_, facts)| facts.is_empty()) {
        found.fact("nothing", "is set that changes what the programs do");
    }
    found
}

fn build(found: &mut Found) {
    found.topic("build");
    found.fact("vit-cli", env!("CARGO_PKG_VERSION"));
    found.fact("target", format!("{} on {}", std::env::consts::ARCH, std::env::consts::OS));
    let features = [
        ("hub", cfg!(feature = "hub")),
        ("serve", cfg!(feature = "serve")),
        ("cuda", cfg!(feature = "cuda")),
        ("metal", cfg!(feature = "metal")),
    ];
    let on: Vec<&str> = features.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
    found.fact("features", if on.is_empty() { "none".into() } else { on.join(", ") });
    if cfg!(debug_assertions) {
        found.advice.push("this is a debug build, which is many times slower: cargo build --release".into());
    }
}

fn cpu(found: &mut Found) {
    found.topic("CPU");
    if let Some(name) = cpu_name() {
        found.fact("model", escape(&name));
    }
    let (cores, threads) = (physical_cores(), hardware_threads());
    let limit = if threads < cores { ", which a control group or an affinity limits" } else { "" };
    found.fact(
        "threads",
        format!(
            "{cores} by default: the physical cores among {threads} hardware threads that this process may use{limit}"
        ),
    );
    let chosen = Isa::choose();
    for isa in Isa::ALL {
        let names = |isa| precisions(isa).iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let state = match &chosen {
            _ if !isa.available() => "not on this CPU".to_owned(),
            Ok(chosen) if *chosen == isa => format!("{} (used)", names(isa)),
            _ => names(isa),
        };
        found.fact(format!("kernels {isa}"), state);
    }
    match &chosen {
        Err(error) => found.advice.push(escape(&error.to_string())),
        Ok(Isa::Portable) => found.advice.push("this CPU has no kernels of its own yet; portable code runs, and is several times slower".into()),
        Ok(Isa::Avx2) => found.advice.push(
            "this CPU has AVX2 alone: f32 is the fastest precision that is as exact, and bf16 and int8 need AVX-512 or AMX to be much faster".into(),
        ),
        Ok(isa) => found.advice.push(format!(
            "--precision bf16 or int8 is faster still on {isa}; `vit-cli eval --compare-precision int8` says what it costs on your images"
        )),
    }
}

fn gpu(found: &mut Found) {
    found.topic("GPU");
    if !cfg!(any(feature = "cuda", feature = "metal")) {
        found.fact("none", "this build supports no GPU (cargo install --features cuda, or metal)");
        return;
    }
    let built = [(cfg!(feature = "cuda"), Device::Cuda(0)), (cfg!(feature = "metal"), Device::Metal(0))];
    for (_, device) in built.into_iter().filter(|(built, _)| *built) {
        let state = device.to_candle().map_or_else(|error| escape(&error.to_string()), |_| "can be used".into());
        found.fact(device.to_string(), state);
    }
}

#[cfg(feature = "hub")]
fn hub(found: &mut Found, offline: bool) {
    found.topic("Hub");
    let mut options = match HubOptions::from_env() {
        Ok(options) => options,
        Err(error) => return found.fact("cache", escape(&error.to_string())),
    };
    found.fact("endpoint", escape(&options.endpoint));
    found.fact(
        "token",
        if options.token.is_some() { "there is one" } else { "none, which public repositories do not need" },
    );
    options.offline |= offline;
    // a question on the first minute should not take ten seconds
    options.patience = options.patience.min(std::time::Duration::from_secs(3));
    match Hub::new(options) {
        Ok(hub) => {
            let cached = hub.list();
            let megabytes = cached.iter().map(|c| c.bytes).fold(0, u64::saturating_add).div_ceil(1_000_000);
            found.fact("cache", format!("{}: {} models, {megabytes} MB", show(hub.cache()), cached.len()));
            let state = match hub.reach() {
                _ if offline => "not asked (--offline)".into(),
                Ok(time) => format!("answers in {} ms", time.as_millis()),
                Err(error) => escape(&error.to_string()),
            };
            found.fact("reachable", state);
        }
        Err(error) => found.fact("reachable", escape(&error.to_string())),
    }
}

/// What the system calls this CPU.
fn cpu_name() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

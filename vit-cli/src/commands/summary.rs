//! `summary`: a model's modules, shapes and parameters, as a tree, as torchsummary's table, or as JSON.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::Path;

use serde_json::{Value, json};
use vit_model::Config;
use vit_model::names::Architecture;

use crate::args::{SummaryArgs, SummaryStyle};
use crate::modules::{self, Module, elements};
use crate::output::{Stdout, json_pretty, thousands};

pub fn run(args: &SummaryArgs) -> anyhow::Result<()> {
    let config = config(&args.model)?;
    let text = match args.style {
        SummaryStyle::Tree => tree(&config)?,
        SummaryStyle::Torchsummary => torchsummary(&config)?,
        SummaryStyle::Json => json_pretty(&json_summary(&config)?)? + "\n",
    };
    let mut out = Stdout::new();
    out.write(&text)?;
    out.flush()
}

/// The architecture of a model, or the one with this timm name. Needs no weights.
fn config(model: &OsStr) -> anyhow::Result<Config> {
    match model.to_str().and_then(Architecture::of) {
        Some(architecture) if !Path::new(model).exists() => Ok(crate::model::resized(architecture.config)),
        _ => Ok(crate::model::info(model)?.model),
    }
}

/// The output of `torchsummary.summary(model, (C, H, W))`, and one line on the parameters that torchsummary does not
/// count.
///
/// torchsummary lists modules in the order in which their calls end, one line per call, without containers
/// (`Sequential`, `ModuleList`). It counts only parameters named `weight` and `bias`.
fn torchsummary(config: &Config) -> vit_model::Result<String> {
    let model = modules::of(config)?;
    let mut rows = Vec::new();
    model.children.iter().for_each(|child| list(child, &mut rows));

    let (thin, thick) = ("-".repeat(64), "=".repeat(64));
    let mut text = format!("{thin}\n{:>20}  {:>25} {:>15}\n{thick}\n", "Layer (type)", "Output Shape", "Param #");
    let (mut counted, mut outputs) = (0, 0);
    for (i, module) in rows.iter().enumerate() {
        let name = format!("{}-{}", module.kind, i + 1);
        let mut shape = String::from("[-1");
        module.output.iter().for_each(|n| write_to(&mut shape, format_args!(", {n}")));
        shape.push(']');
        let params = seen(module);
        counted += params;
        outputs += elements(&module.output);
        write_to(&mut text, format_args!("{name:>20}  {shape:>25} {:>15}\n", thousands(params)));
    }

    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    let [h, w] = config.img_size;
    let input = mib(elements(&[config.in_chans, h, w]) as f64 * 4.0);
    let activations = mib(2.0 * outputs as f64 * 4.0); // twice, for the gradients
    let params = mib(counted as f64 * 4.0);
    write_to(
        &mut text,
        format_args!(
            "{thick}\nTotal params: {n}\nTrainable params: {n}\nNon-trainable params: 0\n{thin}\n\
             Input size (MB): {input:.2}\nForward/backward pass size (MB): {activations:.2}\n\
             Params size (MB): {params:.2}\nEstimated Total Size (MB): {total:.2}\n{thin}\n",
            n = thousands(counted),
            total = params + activations + input,
        ),
    );
    Ok(text + &uncounted(&model) + "\n")
}

/// Lists modules in the order in which their calls end.
fn list<'a>(module: &'a Module, rows: &mut Vec<&'a Module>) {
    module.children.iter().for_each(|child| list(child, rows));
    if !matches!(module.kind, "Sequential" | "ModuleList") {
        rows.push(module);
    }
}

/// The number of parameters that torchsummary counts in a module.
fn seen(module: &Module) -> u128 {
    let named = |name: &str| matches!(name, "weight" | "bias");
    module.params.iter().filter(|(name, _)| named(name)).map(|(_, shape)| elements(shape)).sum()
}

/// One line on the parameters that torchsummary does not count, because they are not called `weight` or `bias`.
fn uncounted(model: &Module) -> String {
    let mut hidden: Vec<(&str, u128)> = Vec::new();
    let mut queue = vec![model];
    while let Some(module) = queue.pop() {
        for (name, shape) in &module.params {
            if matches!(name.as_str(), "weight" | "bias") {
                continue;
            }
            match hidden.iter_mut().find(|(n, _)| n == name) {
                Some((_, count)) => *count += elements(shape),
                None => hidden.push((name, elements(shape))),
            }
        }
        queue.extend(module.children.iter().rev());
    }
    if hidden.is_empty() {
        return "torchsummary counts every parameter of this model.".into();
    }
    let names: Vec<String> = hidden.iter().map(|(name, count)| format!("{name} ({})", thousands(*count))).collect();
    let (last, rest) = names.split_last().map_or(("", &[][..]), |(last, rest)| (last.as_str(), rest));
    let names = if rest.is_empty() { last.into() } else { format!("{} and {last}", rest.join(", ")) };
    format!("torchsummary does not count {names}: with them {} parameters.", thousands(model.parameters()))
}

/// A tree of the modules that change something at inference. Equal blocks are listed once.
fn tree(config: &Config) -> vit_model::Result<String> {
    let model = modules::of(config)?;
    let [h, w] = config.img_size;
    let mut lines = vec![Line::new(model.kind.into(), &model, &model.output)];
    lines[0].shape = format!("[{}, {h}, {w}] → {:?}", config.in_chans, model.output);
    own_lines(&model, "", model.children.iter().any(|c| !c.inert), &mut lines);
    branch(&model, "", &mut lines);

    let name_width = lines.iter().map(|l| l.name.chars().count()).max().unwrap_or(0);
    let shape_width = lines.iter().map(|l| l.shape.chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for Line { name, shape, params } in &lines {
        let pad = |s: &str, width: usize| " ".repeat(width.saturating_sub(s.chars().count()));
        let line = format!("{name}{}  {shape}{}  {params:>15}", pad(name, name_width), pad(shape, shape_width));
        text.push_str(line.trim_end());
        text.push('\n');
    }
    Ok(text)
}

/// One line of the tree.
struct Line {
    name: String,
    shape: String,
    params: String,
}

impl Line {
    fn new(name: String, module: &Module, output: &[usize]) -> Self {
        let count = module.parameters();
        Self { name, shape: format!("{output:?}"), params: if count > 0 { thousands(count) } else { String::new() } }
    }
}

/// Lines for the parameters of the module itself, except for the weight and the bias of a layer.
fn own_lines(module: &Module, indent: &str, more: bool, lines: &mut Vec<Line>) {
    let own: Vec<_> = module.params.iter().filter(|(name, _)| !matches!(name.as_str(), "weight" | "bias")).collect();
    for (i, (name, shape)) in own.iter().enumerate() {
        let mark = if more || i + 1 < own.len() { "├─" } else { "└─" };
        let params = thousands(elements(shape));
        lines.push(Line { name: format!("{indent}{mark} {name}"), shape: format!("{shape:?}"), params });
    }
}

fn branch(module: &Module, indent: &str, lines: &mut Vec<Line>) {
    let shown: Vec<&Module> = module.children.iter().filter(|c| !c.inert).collect();
    // all blocks of a model have the same modules, so the tree shows the first
    let alike = module.name == "blocks" && shown.len() > 1;
    let shown = if alike { &shown[..1] } else { &shown[..] };
    for (i, child) in shown.iter().enumerate() {
        let last = i + 1 == shown.len();
        let (mark, deeper) = if last { ("└─", "   ") } else { ("├─", "│  ") };
        let times =
            if alike { format!("0 … {} (each) ", module.children.len() - 1) } else { format!("{} ", child.name) };
        lines.push(Line::new(format!("{indent}{mark} {times}{}", child.kind), child, &child.output));
        let indent = format!("{indent}{deeper}");
        own_lines(child, &indent, child.children.iter().any(|c| !c.inert), lines);
        branch(child, &indent, lines);
    }
}

fn json_summary(config: &Config) -> vit_model::Result<Value> {
    let model = modules::of(config)?;
    Ok(json!({ "config": config, "parameters": number(model.parameters()), "modules": json_module(&model, "") }))
}

fn json_module(module: &Module, prefix: &str) -> Value {
    let path = match (prefix, module.name.as_str()) {
        ("", name) => name.to_owned(),
        (prefix, name) => format!("{prefix}.{name}"),
    };
    let full = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let tensors: serde_json::Map<String, Value> =
        module.params.iter().map(|(name, shape)| (full(name), json!(shape))).collect();
    let children: Vec<Value> = module.children.iter().filter(|c| !c.inert).map(|c| json_module(c, &path)).collect();
    json!({
        "name": path, "type": module.kind, "output_shape": module.output, "parameters": number(module.parameters()),
        "tensors": tensors, "modules": children,
    })
}

fn number(n: u128) -> Value {
    u64::try_from(n).map_or(Value::Null, Value::from)
}

fn write_to(text: &mut String, what: std::fmt::Arguments<'_>) {
    // writing to a String cannot fail
    let _ = text.write_fmt(what);
}

#[cfg(test)]
mod tests {
    use vit_model::{MlpKind, Pool, PreLogits};

    use super::*;

    /// ViT-B/16 with five classes, the seed's model.
    fn base() -> Config {
        let mut config = Config::default();
        config.num_classes = 5;
        config
    }

    #[test]
    fn vit_base_has_the_published_number_of_parameters() {
        assert_eq!(modules::of(&base()).unwrap().parameters(), 85_802_501);
        // timm's vit_base_patch16_siglip_224 and vit_giant_patch14_reg4_dinov2, from parity/names.json of timm 1.0.31
        let mut siglip = base();
        siglip.num_classes = 0;
        siglip.class_token = false;
        siglip.global_pool = Pool::Map;
        assert_eq!(modules::of(&siglip).unwrap().parameters(), 92_884_224);
        let mut giant = base();
        giant.img_size = [518, 518];
        giant.patch_size = [14, 14];
        giant.num_classes = 0;
        giant.embed_dim = 1536;
        giant.depth = 40;
        giant.num_heads = 24;
        giant.mlp = MlpKind::SwigluPacked;
        giant.mlp_hidden = 8192;
        giant.reg_tokens = 4;
        giant.no_embed_class = true;
        giant.layer_scale = true;
        assert_eq!(modules::of(&giant).unwrap().parameters(), 1_136_483_840);
    }

    #[test]
    fn the_table_equals_torchsummarys() {
        // made by tests/fixtures/torchsummary/make.py, which lists the same cases
        macro_rules! table {
            ($name:literal) => {
                include_str!(concat!("../../../tests/fixtures/torchsummary/", $name, ".txt"))
            };
        }
        let mut pre_logits = base();
        pre_logits.img_size = [32, 48];
        pre_logits.patch_size = [16, 8];
        pre_logits.in_chans = 1;
        pre_logits.num_classes = 7;
        pre_logits.embed_dim = 24;
        pre_logits.depth = 2;
        pre_logits.num_heads = 3;
        pre_logits.mlp_hidden = 50;
        pre_logits.pre_logits = Some(PreLogits::tanh(40));
        let mut distilled = base();
        distilled.img_size = [33, 30];
        distilled.patch_size = [8, 8];
        distilled.num_classes = 11;
        distilled.embed_dim = 32;
        distilled.depth = 1;
        distilled.num_heads = 4;
        distilled.mlp_hidden = 64;
        distilled.qkv_bias = false;
        distilled.dist_token = true;
        let mut headless = base();
        headless.img_size = [64, 64];
        headless.patch_size = [8, 8];
        headless.in_chans = 4;
        headless.num_classes = 0;
        headless.embed_dim = 1024;
        headless.depth = 3;
        headless.num_heads = 16;
        headless.mlp_hidden = 4096;
        for (config, want) in [
            (base(), table!("base")),
            (pre_logits, table!("pre_logits")),
            (distilled, table!("distilled")),
            (headless, table!("headless")),
        ] {
            let text = torchsummary(&config).unwrap();
            let (table, last) = text.trim_end().rsplit_once('\n').unwrap();
            assert_eq!(format!("{table}\n"), want);
            assert!(last.starts_with("torchsummary does not count cls_token ("), "{last}");
        }
    }

    #[test]
    fn the_table_says_what_it_does_not_count() {
        let text = torchsummary(&base()).unwrap();
        assert_eq!(text.lines().count(), 3 + 199 + 11);
        assert_eq!(
            text.lines().last(),
            Some(
                "torchsummary does not count cls_token (768) and pos_embed (151,296): with them 85,802,501 parameters."
            )
        );
    }

    #[test]
    fn the_tree_adds_up() {
        let text = tree(&base()).unwrap();
        let count = |line: &str| -> Option<u128> { line.split_whitespace().last()?.replace(',', "").parse().ok() };
        let top = text.lines().filter(|l| l.starts_with("├─") || l.starts_with("└─"));
        assert_eq!(top.filter_map(count).sum::<u128>(), 85_802_501, "{text}");
    }
}

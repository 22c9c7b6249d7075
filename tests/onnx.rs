//! An ONNX file as a model, without a converted file in between.

use crate::support::{finish, max_diff, read_safetensors, root, run, vit_cli};

/// PyTorch's export of the digits model answers as the converted file does: the weights are the same bits, so the logits are.
#[test]
fn an_onnx_file_is_a_model() {
    let folder = tempfile::tempdir().unwrap();
    let onnx = root().join("weights/digits/model.onnx");
    let done = finish(vit_cli().args(["compare", "digits"]).arg(&onnx).args(["--tolerance", "0"]));
    done.good();
    let csv = finish(
        vit_cli()
            .args(["predict", "-k1", "-f", "csv", "--model"])
            .arg(&onnx)
            .arg(root().join("weights/digits/samples/5.png")),
    );
    assert!(csv.good().lines().nth(1).unwrap().contains(",1,5,"));
    // a quantised graph, converted in memory, within its case's tolerance of the logits that PyTorch had
    let case = root().join("tests/fixtures/zoo/post-int8-dynamic-timm-l17");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(case.join("config.json")).unwrap()).unwrap();
    let y = folder.path().join("y.safetensors");
    let io = case.join("io.safetensors");
    finish(
        vit_cli().arg("forward").arg(case.join("model.onnx")).arg("--input").arg(&io).args(["-t", "x", "-o"]).arg(&y),
    )
    .good();
    let diff = max_diff(&read_safetensors(&y)["logits"].values, &read_safetensors(&io)["logits"].values);
    assert!(f64::from(diff) <= config["tolerance"].as_f64().unwrap(), "{diff}");
}

#[test]
fn inspect_shows_what_became_what() {
    let onnx = root().join("weights/digits/model.onnx");
    let onnx = onnx.to_str().unwrap();
    let text = run(["inspect", onnx]).good();
    for part in ["blocks.0.attn", "transposed", "recovered from", "num_heads"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let report: serde_json::Value = serde_json::from_str(&run(["inspect", "--json", onnx]).good()).unwrap();
    let tensors = report["tensors"].as_object().unwrap();
    let provenance = report["onnx"]["provenance"].as_object().unwrap();
    assert!(tensors.keys().eq(provenance.keys()));
    assert_eq!(report["config"]["model"]["embed_dim"], 64);
}

#[test]
fn what_is_no_vit_is_refused_with_a_reason() {
    for case in ["neg-bert", "neg-text", "neg-external-missing", "arch-order-noresidual-l17"] {
        let onnx = root().join("tests/fixtures/zoo").join(case).join("model.onnx");
        run(["inspect".as_ref(), onnx.as_os_str()]).bad(2, &["model.onnx"]);
    }
}

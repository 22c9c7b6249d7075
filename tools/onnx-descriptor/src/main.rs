//! Compiles a `.proto` file to the descriptor set that `protoc --include_imports --include_source_info` writes.
//!
//! ```console
//! $ cd tools/onnx-descriptor
//! $ cargo run -- ~/.cargo/registry/src/*/candle-onnx-0.11.1/src/onnx.proto3 ../onnx.descriptor
//! ```

use std::path::Path;

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let [proto, out] = &std::env::args().skip(1).collect::<Vec<_>>()[..] else {
        return Err("usage: onnx-descriptor IN.proto OUT.descriptor".into());
    };
    let proto = Path::new(proto);
    let folder = proto.parent().ok_or("the .proto file needs a folder")?;
    let name = proto.file_name().ok_or("the .proto file needs a name")?;
    // comments stay: prost makes documentation of them
    let mut compiler = protox::Compiler::new([folder])?;
    let set = compiler.include_source_info(true).include_imports(true).open_file(name)?.file_descriptor_set();
    std::fs::write(out, set.encode_to_vec())?;
    Ok(())
}

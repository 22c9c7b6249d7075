//! Opens a folder as found on the Hub, in timm's, transformers' or open_clip's format, as a [`Checkpoint`].

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde_json::Value;

use crate::{
    Error, ModelInfo, Result,
    checkpoint::{
        OpenOptions, bare, document,
        model::Checkpoint,
        open_clip, original, peft, prefix, scaled,
        stored::{Found, Stored, candidates},
        text::TextSource,
        timm, torchvision, transformers,
    },
    files::{self, CONFIG, INDEX, OPEN_CLIP, PROCESSORS, WEIGHTS, small_file},
    json,
};

/// Opens a folder with weights and a configuration.
pub(crate) fn open(folder: &Path, options: &OpenOptions) -> Result<Checkpoint> {
    files::expect(folder);
    peft::refuse_adapter(folder)?;
    if let Some(found) = Stored::usual(folder, options.state_dict.as_deref())? {
        return whole(folder, found, options);
    }
    let names = candidates(folder);
    if options.arch.is_none() && !names.is_empty() && folder.join(CONFIG).symlink_metadata().is_ok() {
        info(folder)?; // what is wrong with the configuration is no fault of each file
    }
    let mut fitting = Vec::new();
    let mut reasons = Vec::new();
    for name in names.iter().take(MOST) {
        let found = Stored::file(&folder.join(name), options.state_dict.as_deref());
        match found.and_then(|found| whole(folder, found, options)) {
            Ok(checkpoint) => fitting.push((name, checkpoint)),
            Err(error) => reasons.push(error),
        }
    }
    match (fitting.len(), reasons.len()) {
        (0, 0) => {
            Err(Error::file(folder, format!("holds no weights: neither {WEIGHTS}, {INDEX} nor pytorch_model.bin")))
        }
        (0, 1) => Err(reasons.remove(0)),
        (0, _) => {
            let reasons: Vec<String> = reasons.iter().take(3).map(ToString::to_string).collect();
            let why = format!(
                "holds no {WEIGHTS}, and of {} other files none can be used: {}",
                names.len(),
                reasons.join("; ")
            );
            Err(Error::file(folder, why))
        }
        (1, _) => {
            let (name, checkpoint) = fitting.remove(0);
            Ok(checkpoint.with_notes(vec![format!("the weights are those of {name}")], Vec::new()))
        }
        _ => {
            let names: Vec<&str> = fitting.iter().map(|(name, _)| name.as_str()).collect();
            let why =
                format!("holds no {WEIGHTS}, but several files that could be it: name one of {}", names.join(", "));
            Err(Error::file(folder, why))
        }
    }
}

/// Opens the text tower of a folder, whether there is an image tower beside it or not.
pub(crate) fn text(folder: &Path) -> Result<TextSource> {
    files::expect(folder);
    let (config_path, config, _) = documents(folder)?;
    let none = || Error::file(config_path, "describes no text tower; CLIP and SigLIP have one");
    let Some(Found::Weights(mut stored)) = Stored::usual(folder, None)? else { return Err(none()) };
    prefix::unwrap(&mut stored, None)?;
    TextSource::transformers(folder, &config, &stored.weights).ok_or_else(none)
}

/// Whether a folder's configuration is that of a text tower without images.
#[cfg(feature = "hub")]
pub(crate) fn is_text_tower(folder: &Path) -> Result<bool> {
    Ok(transformers::text::is_alone(&documents(folder)?.1))
}

/// How many files without a usual name are tried.
const MOST: usize = 32;

/// A model from the files of its folder.
fn whole(folder: &Path, found: Found, options: &OpenOptions) -> Result<Checkpoint> {
    match found {
        Found::Ours(file) => document::ours(file),
        Found::Weights(stored) => tie(folder, stored, options),
    }
}

/// Reads the document of a folder without its weights, which is enough to preprocess images.
pub(crate) fn info(folder: &Path) -> Result<ModelInfo> {
    files::expect(folder);
    let beside = folder.join(OPEN_CLIP);
    if folder.join(CONFIG).symlink_metadata().is_err() && beside.symlink_metadata().is_ok() {
        return open_clip::info(&value(&beside)?, None).map_err(|error| error.within(&beside));
    }
    let (path, config, processor) = documents(folder)?;
    if timm::describes(&config) {
        return timm::info(&config).map_err(|why| Error::file(&path, why));
    }
    let (mut info, _) = transformers::info(&config, processor.as_ref(), None).map_err(|error| error.within(&path))?;
    let [_, h, w] = info.preprocess.input_size;
    info.model.img_size = [h, w];
    Ok(info)
}

/// `config.json`, its content, and that of the processor's file, if there is one.
type Documents = (PathBuf, Value, Option<Value>);

fn documents(folder: &Path) -> Result<Documents> {
    let path = folder.join(CONFIG);
    if path.symlink_metadata().is_err() {
        return Err(Error::file(folder, "holds no config.json, which describes the model"));
    }
    let config = value(&path)?;
    if !config.is_object() {
        return Err(Error::file(&path, format!("must hold an object, found {}", kind(&config))));
    }
    let mut processor = None;
    for name in PROCESSORS {
        let beside = folder.join(name);
        if processor.is_none() && beside.symlink_metadata().is_ok() {
            let found = value(&beside)?;
            // the file of a processor of images and text holds that of images under a key
            processor = match found.get("image_processor") {
                Some(images) => Some(images.clone()),
                None if name == PROCESSORS[0] || found.get("image_processor_type").is_some() => Some(found),
                None => None,
            };
        }
    }
    Ok((path, config, processor))
}

fn value(path: &Path) -> Result<Value> {
    json::parse(&small_file(path)?).map_err(|why| Error::file(path, why))
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Combines weights with the configuration files of a folder, or with what their names say if it has none.
pub(super) fn tie(folder: &Path, mut stored: Stored, options: &OpenOptions) -> Result<Checkpoint> {
    let path = stored.path.clone();
    let within = |error: Error| error.within(&path);
    prefix::unwrap(&mut stored, options.state_dict.as_deref())?;
    peft::merge(&mut stored, Some(folder))?;
    scaled::merge(&mut stored).map_err(within)?;
    let has = |name: &str| folder.join(name).symlink_metadata().is_ok();
    let clip = original::is_clip(&stored) || original::is_trunk(&stored);
    let config = if has(CONFIG) && options.arch.is_none() { Some(documents(folder)?) } else { None };
    let checkpoint = match config {
        _ if torchvision::is(stored.weights.tensors()) && options.arch.is_none() => torchvision::open(&stored, None)?,
        // a repository may describe the same weights for transformers and for open_clip
        Some(documents) if !(clip && has(OPEN_CLIP) && documents.1.get("architecture").is_none()) => {
            configured(folder, documents, &mut stored)?
        }
        _ if options.arch.is_none() && has(OPEN_CLIP) => {
            let file = folder.join(OPEN_CLIP);
            let info = open_clip::info(&value(&file)?, Some(&stored)).map_err(|error| error.within(&file))?;
            named(info, &mut stored)?
        }
        _ if options.arch.is_none() && original::is_clip(&stored) => {
            let info = open_clip::openai(&stored)?;
            named(info, &mut stored)?
        }
        _ => {
            let info = bare::info(&mut stored, options.arch.as_deref())?;
            left_over(&stored)?;
            Checkpoint::new(info, stored.weights.clone()).map_err(within)?
        }
    };
    Ok(checkpoint.with_notes(stored.remarks, stored.assumed))
}

/// A model whose document is known, with weights that may have their original names.
fn named(info: ModelInfo, stored: &mut Stored) -> Result<Checkpoint> {
    original::timm_names(stored, &info.model).map_err(|error| error.within(&stored.path))?;
    left_over(stored)?;
    Checkpoint::new(info, stored.weights.clone()).map_err(|error| error.within(&stored.path))
}

/// A model that config.json describes.
fn configured(folder: &Path, (config_path, config, processor): Documents, stored: &mut Stored) -> Result<Checkpoint> {
    if !timm::describes(&config) {
        let (info, names) = transformers::info(&config, processor.as_ref(), Some(stored.weights.tensors()))
            .map_err(|error| error.within(&config_path))?;
        let renamed = names.views(&stored.weights, &info.model).map_err(|error| error.within(&stored.path))?;
        let text = TextSource::transformers(folder, &config, &stored.weights);
        // the processor decides which images there are, and the model takes them as they come
        let checkpoint = Checkpoint::new(info, Arc::new(renamed)).and_then(Checkpoint::for_its_input);
        let checkpoint = checkpoint.map(|checkpoint| checkpoint.with_text(text));
        return checkpoint.map_err(|error| error.within(&stored.path));
    }
    let mut info = timm::info(&config).map_err(|why| Error::file(&config_path, why))?;
    original::timm_names(stored, &info.model).map_err(|error| error.within(&stored.path))?;
    left_over(stored)?;
    let weights = timm::loaded(stored.weights.clone(), &config, &mut info).map_err(|e| e.within(&stored.path))?;
    Checkpoint::new(info, weights).map_err(|error| error.within(&stored.path))
}

fn left_over(stored: &Stored) -> Result<()> {
    match stored.others.first() {
        Some(other) => {
            Err(Error::file(&stored.path, format!("tensor `{other}` is left over: not a tensor of weights")))
        }
        None => Ok(()),
    }
}

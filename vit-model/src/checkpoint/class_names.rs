//! The names of classes as configurations have them: lists and objects, complete or not.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::{Error, Result, limits};

/// Class names, and what was assumed about those that are missing or too many. A class without a name is called by its number.
pub(super) type Named = (Option<Vec<String>>, Option<String>);

/// Names by the number of their class: `{"0": "daisy", …}`, or a list in the order of the classes. Numbers and booleans are
/// names, too, as some programs write them.
pub(super) fn by_number(key: &str, names: Option<&Value>, classes: usize) -> Result<Named> {
    let fail = |why: String| Error::config(format!("`{key}` {why}"));
    let name = |value: &Value| match value {
        Value::String(name) => Ok(name.clone()),
        Value::Number(number) => Ok(number.to_string()),
        Value::Bool(flag) => Ok(flag.to_string()),
        other => Err(fail(format!("must hold names, found {other}"))),
    };
    let mut found = BTreeMap::new();
    match names {
        None | Some(Value::Null) => return Ok((None, None)),
        Some(Value::Array(list)) => {
            for (class, value) in list.iter().enumerate() {
                found.insert(class, name(value)?);
            }
        }
        Some(Value::Object(map)) => {
            for (class, value) in map {
                let number =
                    class.trim().parse().map_err(|_| fail(format!("has the class {class:?}, expected a number")))?;
                if found.insert(number, name(value)?).is_some() {
                    return Err(fail(format!("has the class {class:?} twice")));
                }
            }
        }
        Some(other) => return Err(fail(format!("must be an object or a list of names, found {other}"))),
    }
    if found.is_empty() {
        return Ok((None, None));
    }
    let named = found.range(..classes).count();
    // each gets its number as its name
    if classes.saturating_sub(named) > limits::UNNAMED_CLASSES {
        return Err(fail(format!(
            "names {named} of {classes} classes; at most {} may have no name",
            limits::UNNAMED_CLASSES
        )));
    }
    let note = (named != classes || found.len() != named).then(|| {
        let unnamed = classes.saturating_sub(named);
        let rest = match (unnamed, found.len().saturating_sub(named)) {
            (0, more) => format!("{more} label names are of classes that the head does not have"),
            (few, 0) => format!("{few} classes have no label name and are called by their number"),
            (few, more) => format!("{few} classes are called by their number, and {more} label names are of no class"),
        };
        format!("labels: `{key}` has {} label names, but the head has {classes} classes; {rest}", found.len())
    });
    let labels = (0..classes).map(|class| found.remove(&class).unwrap_or_else(|| class.to_string())).collect();
    Ok((Some(labels), note))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn labels(names: &Value, classes: usize) -> (Vec<String>, bool) {
        let (labels, note) = by_number("id2label", Some(names), classes).unwrap();
        (labels.unwrap(), note.is_some())
    }

    #[test]
    fn names_are_taken_by_number_not_by_place() {
        let expected = (vec!["a".to_owned(), "b".into(), "c".into()], false);
        assert_eq!(labels(&json!({"2": "c", "0": "a", "1": "b"}), 3), expected);
        assert_eq!(labels(&json!(["a", "b", "c"]), 3), expected);
        assert_eq!(labels(&json!({"0": 7, "1": true}), 2), (vec!["7".into(), "true".into()], false));
    }

    #[test]
    fn gaps_and_other_counts_are_said_and_filled_with_numbers() {
        assert_eq!(labels(&json!({"0": "a", "2": "c"}), 3), (vec!["a".into(), "1".into(), "c".into()], true));
        assert_eq!(labels(&json!(["a"]), 2), (vec!["a".into(), "1".into()], true));
        assert_eq!(labels(&json!(["a", "b"]), 1), (vec!["a".into()], true));
        assert!(by_number("id2label", Some(&json!({"x": "a"})), 1).is_err());
        assert!(by_number("id2label", Some(&json!([[]])), 1).is_err());
        assert_eq!(by_number("id2label", None, 3).unwrap(), (None, None));
    }
}

//! How many threads an engine should have.

/// The physical cores that this process may run on, which is the default number of threads.
pub fn physical_cores() -> usize {
    let allowed = available();
    #[cfg(target_os = "linux")]
    if let Some(cores) = linux_cores() {
        return cores.clamp(1, allowed);
    }
    allowed
}

/// The hardware threads that this process may use: its affinity and, on Linux, its control group's quota.
pub fn available() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Cores among the allowed hardware threads, which are told apart by their lists of siblings.
#[cfg(target_os = "linux")]
fn linux_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let cpus = parse_list(list)?;
    let mut cores = std::collections::BTreeSet::new();
    for cpu in cpus {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        cores.insert(std::fs::read_to_string(path).ok()?.trim().to_owned());
    }
    Some(cores.len())
}

/// `0-3,8` → 0, 1, 2, 3, 8.
#[cfg(target_os = "linux")]
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        if last.saturating_sub(first) > 1 << 16 {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_always_a_core() {
        assert!((1..=available()).contains(&physical_cores()));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn cpu_lists() {
        assert_eq!(parse_list("\t0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(parse_list("x"), None);
        assert_eq!(parse_list("0-99999999999"), None);
    }
}

//! A thread pool whose threads all run the same pass and wait for each other after each phase. Idle threads sleep.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// Iterations of a waiting loop before a thread sleeps: some tens of microseconds, the length of a short phase.
const SPINS: usize = 4000;

/// The work of a pass, as every thread runs it. The lifetime is erased: [`Threads::run`] outlives every use.
type Work = *const (dyn Fn(&Worker<'_>) + Sync);

/// Threads that wait for a pass to run.
pub(crate) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held by the caller whose pass runs.
    turn: Mutex<()>,
}

struct Shared {
    count: usize,
    slot: Mutex<Slot>,
    start: Condvar,
    barrier: Barrier,
    /// The units of the current phase that each thread has not run yet.
    shares: Box<[Share]>,
    /// Whether a thread of this pass has panicked, so that no other waits for it.
    broken: AtomicBool,
}

/// The units of one thread: the first, one bit that tells odd phases from even ones, and the end, in a cache line of its own.
///
/// The first thread to access a share in a phase, its owner or an idle thread, finds the bit of the last phase and sets the
/// share up. At the end of a phase all shares are empty.
#[repr(align(128))]
struct Share(AtomicU64);

impl Share {
    fn pack(odd: bool, first: usize, end: usize) -> u64 {
        (first as u64) << 33 | u64::from(odd) << 32 | end as u64
    }

    fn unpack(word: u64) -> (bool, usize, usize) {
        (word >> 32 & 1 == 1, (word >> 33) as usize, (word & 0xffff_ffff) as usize)
    }
}

struct Slot {
    work: Option<SendWork>,
    pass: usize,
    running: usize,
    stop: bool,
    panic: Option<Box<dyn Any + Send>>,
}

#[derive(Clone, Copy)]
struct SendWork(Work);
// SAFETY: the closure is `Sync`, and `Threads::run` returns only when no thread calls it any more
unsafe impl Send for SendWork {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // a panic inside a pass reaches its caller, and leaves the data behind the lock consistent
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread's place in a pass.
pub(crate) struct Worker<'a> {
    /// 0 is the caller's own thread.
    pub(crate) index: usize,
    shared: &'a Shared,
}

impl Worker<'_> {
    /// Runs `f` once for every unit, on one thread each, and returns when all are done. Each thread runs neighbouring units in
    /// order, so that it knows what it will read next, and then steals units from the end of another's range.
    ///
    /// Every thread of the pass must make the same calls in the same order.
    pub(crate) fn each(&self, units: usize, mut f: impl FnMut(usize)) {
        debug_assert!(units < 1 << 31, "a share has 31 bits for a unit");
        let shared = self.shared;
        let odd = shared.barrier.phase.load(SeqCst) % 2 == 1;
        for other in 0..shared.count {
            while let Some(unit) = shared.take((self.index + other) % shared.count, units, odd, other > 0) {
                f(unit);
            }
        }
        shared.barrier.wait(shared);
    }
}

impl Threads {
    /// A pool of `count` threads, including the caller's, or of as many as the system allows.
    pub(crate) fn new(count: usize) -> Self {
        let mut pool = Self::with_count(count.max(1));
        for index in 1..pool.shared.count {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("vit-cpu-{index}"));
            let Ok(thread) = thread.spawn(move || shared.serve(index)) else {
                // no pass has run yet, so a smaller pool can take this one's place
                drop(pool);
                return Self::new(index);
            };
            pool.threads.push(thread);
        }
        pool
    }

    fn with_count(count: usize) -> Self {
        let slot = Slot { work: None, pass: 0, running: 0, stop: false, panic: None };
        let shared = Shared {
            count,
            slot: Mutex::new(slot),
            start: Condvar::new(),
            barrier: Barrier::default(),
            shares: (0..count).map(|_| Share(AtomicU64::new(0))).collect(),
            broken: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), threads: Vec::new(), turn: Mutex::new(()) }
    }

    /// Threads of the pool, the caller's included.
    pub(crate) fn count(&self) -> usize {
        self.shared.count
    }

    /// Runs `work` on every thread and returns when all have finished. A second caller waits until the first has finished.
    ///
    /// # Panics
    /// If `work` does, on any thread.
    pub(crate) fn run(&self, work: &(dyn Fn(&Worker<'_>) + Sync)) {
        let _turn = lock(&self.turn);
        let shared = &*self.shared;
        let last_odd = shared.barrier.phase.load(SeqCst).is_multiple_of(2);
        for share in &shared.shares {
            share.0.store(Share::pack(last_odd, 0, 0), SeqCst);
        }
        shared.broken.store(false, SeqCst);
        shared.barrier.arrived.store(0, SeqCst);
        if shared.count > 1 {
            // SAFETY: only the lifetime changes, and this function returns only when no thread runs the work any more
            let work = unsafe { std::mem::transmute::<&(dyn Fn(&Worker<'_>) + Sync), Work>(work) };
            let mut slot = lock(&shared.slot);
            slot.work = Some(SendWork(work));
            slot.pass += 1;
            slot.running = shared.count - 1;
            drop(slot);
            shared.start.notify_all();
        }
        shared.work(0, work);
        let mut slot = lock(&shared.slot);
        while slot.running > 0 {
            slot = shared.barrier.woken.wait(slot).unwrap_or_else(PoisonError::into_inner);
        }
        slot.work = None;
        if let Some(panic) = slot.panic.take() {
            drop(slot);
            resume_unwind(panic);
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.slot).stop = true;
        self.shared.start.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join(); // its panics were caught
        }
    }
}

impl Shared {
    /// Takes one unit of a thread's share of this phase, the first or the last, if any remains.
    fn take(&self, thread: usize, units: usize, odd: bool, last: bool) -> Option<usize> {
        let share = &self.shares[thread].0;
        let mut found = share.load(SeqCst);
        loop {
            let (of_this_phase, mut first, mut end) = Share::unpack(found);
            let begun = of_this_phase == odd;
            if !begun {
                (first, end) = (units * thread / self.count, units * (thread + 1) / self.count);
            }
            let unit = if last { end.wrapping_sub(1) } else { first };
            let left = match (first < end, last) {
                (false, _) if begun => return None,
                (false, _) => (first, end),
                (true, false) => (first + 1, end),
                (true, true) => (first, end - 1),
            };
            match share.compare_exchange_weak(found, Share::pack(odd, left.0, left.1), SeqCst, SeqCst) {
                Ok(_) => return (first < end).then_some(unit),
                Err(now) => found = now,
            }
        }
    }

    /// What a thread of the pool does: it sleeps until there is a pass, and runs it.
    fn serve(&self, index: usize) {
        let mut seen = 0;
        loop {
            let mut slot = lock(&self.slot);
            while slot.pass == seen && !slot.stop {
                slot = self.start.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            if slot.stop {
                return;
            }
            seen = slot.pass;
            let work = slot.work;
            drop(slot);
            if let Some(SendWork(work)) = work {
                // SAFETY: `run` keeps the work alive until this thread has finished
                self.work(index, unsafe { &*work });
            }
            let mut slot = lock(&self.slot);
            slot.running -= 1;
            drop(slot);
            self.barrier.woken.notify_all();
        }
    }

    fn work(&self, index: usize, work: &(dyn Fn(&Worker<'_>) + Sync)) {
        let worker = Worker { index, shared: self };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(&worker))) {
            lock(&self.slot).panic.get_or_insert(panic);
            self.broken.store(true, SeqCst);
            drop(lock(&self.slot)); // so that a thread that saw `broken` unset is already waiting for `woken`
            self.barrier.woken.notify_all();
        }
    }
}

/// Makes the threads of a pass wait for each other between two phases.
#[derive(Default)]
struct Barrier {
    arrived: AtomicUsize,
    phase: AtomicUsize,
    sleepers: AtomicUsize,
    woken: Condvar,
}

impl Barrier {
    /// Returns when all threads have arrived.
    fn wait(&self, shared: &Shared) {
        let phase = self.phase.load(SeqCst);
        if self.arrived.fetch_add(1, SeqCst) + 1 == shared.count {
            self.arrived.store(0, SeqCst);
            self.phase.fetch_add(1, SeqCst);
            if self.sleepers.load(SeqCst) > 0 {
                drop(lock(&shared.slot)); // so that a thread that saw the old phase is already waiting for `woken`
                self.woken.notify_all();
            }
            return;
        }
        let over = || self.phase.load(SeqCst) != phase || shared.broken.load(SeqCst);
        for _ in 0..SPINS {
            if over() {
                break;
            }
            std::hint::spin_loop();
        }
        if !over() {
            let mut slot = lock(&shared.slot);
            self.sleepers.fetch_add(1, SeqCst);
            while !over() {
                slot = self.woken.wait(slot).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, SeqCst);
        }
        assert!(!shared.broken.load(SeqCst), "another thread of this pass has panicked");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_every_phase_runs_once_and_phases_do_not_mix() {
        for count in [1, 2, 3, 7] {
            let pool = Threads::new(count);
            for _ in 0..20 {
                let done = [const { AtomicUsize::new(0) }; 40];
                pool.run(&|worker| {
                    for phase in 0..10 {
                        worker.each(done.len(), |unit| {
                            assert_eq!(done[unit].fetch_add(1, SeqCst), phase);
                        });
                    }
                });
                assert!(done.iter().all(|d| d.load(SeqCst) == 10));
            }
        }
    }

    #[test]
    fn callers_take_turns() {
        let pool = Threads::new(3);
        let inside = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(&|worker| {
                            if worker.index == 0 {
                                assert_eq!(inside.fetch_add(1, SeqCst), 0);
                            }
                            worker.each(5, |_| ());
                            if worker.index == 0 {
                                inside.fetch_sub(1, SeqCst);
                            }
                        });
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Threads::new(2);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(&|worker| worker.each(4, |unit| assert_ne!(unit, 3, "unit 3")));
        }));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(&|worker| {
            worker.each(4, |unit| {
                sum.fetch_add(unit, SeqCst);
            });
        });
        assert_eq!(sum.load(SeqCst), 6);
    }
}

//! The cache in a store that several machines share: packs, each put once under a name of its own and never changed, so that
//! no run stands in another's way. A run brings those that it has not got into its machine's copy, and puts packs of what it
//! computes. Invariants: a pack that is damaged, foreign or gone costs computation, never a result; packs take no more
//! than the bound (runs that put at once may exceed it by a pack each, until the next is put).

use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;

use super::copy::Room;
use super::pack::{MAX_BYTES, Pack, PackBuilder, PackName};
use super::{Cache, Role, is_damage};
use crate::storage::{Listed, Location, Storage};

/// How long the store may take for one request, tries included: a job waits for it at its start and at its end.
const LIMIT: Duration = Duration::from_mins(1);
/// Packs that are fetched at once.
const FETCHES: usize = 4;
/// After so many packs one after the other that could not be fetched, no more are asked for.
const MAX_FAILURES: u32 = 3;
/// What a pack counts for the bound at least, so that the number of packs is bounded too: each run lists and looks at all.
const FLOOR_BYTES: u64 = 256 << 10;
/// In a small cache, what a pack counts at least is this part of the whole.
const MAX_SHARE: u64 = 64;
/// Names that a warning tells.
const NAMES_TOLD: usize = 3;

/// See the module.
#[derive(Debug)]
pub struct Packs {
    storage: Storage,
    at: Location,
    max_bytes: u64,
}

/// What a store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackStats {
    /// Results; one that is in two packs counts twice.
    pub n_results: u64,
    /// Packs.
    pub n_packs: u64,
    /// What results take, unpacked: what the bound is of, but for packs so small that they count as more.
    pub n_bytes: u64,
    /// What the packs take in the store.
    pub n_packed: u64,
}

/// What was brought into a copy.
#[derive(Debug, Default)]
pub struct Brought {
    /// Packs.
    pub n_packs: u64,
    /// What they take in the store.
    pub n_packed: u64,
    /// Packs written before this time, unix milliseconds, are the first to go when room is needed.
    pub renew_before: Option<i64>,
    /// What was passed over.
    pub warnings: Vec<String>,
}

impl Packs {
    /// The packs directly under a URL, kept under `max_bytes`.
    ///
    /// # Errors
    /// A URL that means no store which lists what it holds.
    pub fn new(url: &str, max_bytes: u64) -> Result<Self> {
        let at = Location::parse(url)?;
        ensure!(!at.is_web(), "{}: a web server can't hold a cache, for it lists nothing", at.url);
        Ok(Self { storage: Storage::new()?.hurried(LIMIT), at, max_bytes })
    }

    /// Asks the store for its list, to see whether it is there.
    ///
    /// # Errors
    /// The store's.
    pub fn check(&self) -> Result<()> {
        self.list().map(drop).with_context(|| format!("cannot use the cache {}", self.at.url))
    }

    /// Its URL as it was typed.
    pub fn url(&self) -> &str {
        &self.at.url
    }

    /// The folder for this machine's copy, one of those under `folder`.
    ///
    /// # Errors
    /// None that is known: a path of a store is one.
    pub fn copy_folder(&self, folder: &Path) -> Result<PathBuf> {
        let hash = blake3::hash(self.at.same_store(self.at.path.as_ref())?.url.as_bytes());
        Ok(folder.join(format!("{}{}", super::copy::FOLDERS, &hash.to_hex()[..16])))
    }

    /// What the copy may grow to: what a database leaves free in its pages does not count in the store.
    pub fn copy_bytes(&self) -> u64 {
        self.max_bytes.saturating_add(self.max_bytes / 2)
    }

    fn list(&self) -> Result<Vec<Listed>> {
        self.storage.list_by_age(&self.at)
    }

    /// Opens this machine's copy under `folder` and brings it up to date with the store, as far as that can be done. One that is
    /// damaged is made anew.
    ///
    /// # Errors
    /// The copy can't be opened.
    pub fn bring(&self, folder: &Path, kind: &str) -> Result<(Cache, Result<Brought>)> {
        let folder = self.copy_folder(folder)?;
        let open = || {
            let copy = Cache::open_copy(&folder, self.copy_bytes(), None)?;
            match self.bring_into(&copy, kind) {
                Err(error) if is_damage(&error) => Err(error),
                brought => Ok((copy, brought)),
            }
        };
        match open() {
            Err(error) if is_damage(&error) => Cache::clear_as(&folder, Role::Copy { renew_before: 0 }).and_then(|()| open()),
            opened => opened,
        }
    }

    /// Packs that are gone go, those of results of this kind come, the youngest first, as far as there is room.
    fn bring_into(&self, copy: &Cache, kind: &str) -> Result<Brought> {
        // Before the list: a pack that another run of this machine puts meanwhile would seem to be gone from the store.
        let known = copy.packs()?;
        let listed = self.list()?;
        let mut brought = Brought { renew_before: self.renew_before(&listed), ..Brought::default() };
        brought.warnings.extend(self.foreign(&listed));
        let there: HashSet<&String> = listed.iter().map(|object| &object.name).collect();
        copy.drop_packs(known.iter().filter(|name| !there.contains(name)))?;
        let is_wanted = |object: &&Listed| {
            PackName::parse(&object.name).is_some_and(|name| name.kind == kind) && !known.contains(&object.name)
        };
        let wanted: Vec<&Listed> = listed.iter().rev().filter(is_wanted).collect();
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            let (fetched, packs) = sync_channel(0);
            for _ in 0..FETCHES.min(wanted.len()) {
                let (fetched, next, wanted) = (fetched.clone(), &next, &wanted);
                scope.spawn(move || {
                    while let Some(object) = wanted.get(next.fetch_add(1, Relaxed)) {
                        if fetched.send((*object, self.fetch(object))).is_err() {
                            return;
                        }
                    }
                });
            }
            drop(fetched);
            let mut n_failures = 0;
            for (object, fetched) in packs {
                n_failures = if fetched.is_err() { n_failures + 1 } else { 0 };
                // Unpacked here, one at a time: they are several times as large then. One that can't be fetched may be one
                // that the store has lost or forbids: it is no reason to do without the others.
                let pack = fetched.unwrap_or_else(|error| Some(Err(error)));
                match pack.map(|content| content.and_then(|content| Pack::read(&content))) {
                    None => {}
                    Some(Err(why)) => {
                        let url = self.at.child(&object.name)?.url;
                        brought.warnings.push(format!("{url}: {why:#}; this pack is passed over"));
                        if n_failures == MAX_FAILURES {
                            let text = format!("going on with what is here of the cache {}: no more is fetched", self.at.url);
                            brought.warnings.push(text);
                            break;
                        }
                    }
                    Some(Ok(pack)) => {
                        brought.n_packs += 1;
                        brought.n_packed += object.n_bytes;
                        if copy.take_pack(&object.name, millis(object.changed_at), &pack)? == Room::None {
                            break;
                        }
                    }
                }
            }
            Ok(brought)
        })
    }

    /// What may be a pack, or why it is none; `None` if it is gone.
    fn fetch(&self, object: &Listed) -> Result<Option<Result<Bytes>>> {
        if object.n_bytes > MAX_BYTES {
            return Ok(Some(Err(anyhow!("it is larger than any pack"))));
        }
        Ok(self.storage.get(&self.at.child(&object.name)?)?.map(Ok))
    }

    /// The time before which packs were written that are not in the younger half of what the bound allows.
    fn renew_before(&self, listed: &[Listed]) -> Option<i64> {
        let mut n_bytes = 0;
        let old = packs(listed).rev().find(|object| {
            n_bytes += self.counted(n_unpacked(object));
            n_bytes > self.max_bytes / 2
        });
        old.map(|object| millis(object.changed_at) + 1)
    }

    /// What a pack counts for the bound that unpacks to so many bytes.
    fn counted(&self, n_bytes: u64) -> u64 {
        n_bytes.max(FLOOR_BYTES.min(self.max_bytes / MAX_SHARE))
    }

    /// What to say of objects that are not the cache's.
    fn foreign(&self, listed: &[Listed]) -> Option<String> {
        let names: Vec<&str> = listed.iter().map(|object| &*object.name).filter(|name| !PackName::is_ours(name)).collect();
        let (first, more) = names.split_at(names.len().min(NAMES_TOLD));
        let mut text = format!("{}: what is no pack of results is passed over: {}", self.at.url, first.join(", "));
        if !more.is_empty() {
            write!(text, " and {} more", more.len()).ok()?;
        }
        (!names.is_empty()).then_some(text)
    }

    /// Puts a pack of results of this kind, after those were removed that it leaves no room for, and takes it into the copy.
    ///
    /// # Errors
    /// The store's: the pack is not there then, or nobody has said that it is.
    pub fn keep(&self, pack: PackBuilder, kind: &str, copy: &Cache) -> Result<()> {
        let (name, content) = pack.seal(kind)?;
        self.make_room(PackName::parse(&name).map_or(0, |name| name.n_bytes))?;
        let at = self.at.child(&name)?;
        self.storage.put(&at, content.clone())?;
        // By the store's clock, as packs that are fetched: by two clocks, the wrong ones would seem old. If that fails, the next
        // run fetches the pack.
        if let Ok(Some(written)) = self.storage.changed_at(&at) {
            let _not_in_the_copy = Pack::read(&content).and_then(|pack| copy.take_pack(&name, millis(written), &pack));
        }
        Ok(())
    }

    /// Removes the oldest packs, until one more, of so many bytes, is within the bound.
    fn make_room(&self, n_bytes: u64) -> Result<()> {
        let listed = self.list()?;
        let mut total = self.counted(n_bytes) + packs(&listed).map(|object| self.counted(n_unpacked(object))).sum::<u64>();
        let mut oldest = Vec::new();
        for object in packs(&listed) {
            if total <= self.max_bytes {
                break;
            }
            total -= self.counted(n_unpacked(object));
            oldest.push(self.at.child(&object.name)?);
        }
        self.storage.delete_all(&oldest)
    }

    /// What it holds.
    ///
    /// # Errors
    /// The store's.
    pub fn stats(&self) -> Result<PackStats> {
        let mut stats = PackStats::default();
        for object in packs(&self.list()?) {
            stats.n_packs += 1;
            stats.n_bytes += n_unpacked(object);
            stats.n_packed += object.n_bytes;
            stats.n_results += PackName::parse(&object.name).map_or(0, |name| name.n_results);
        }
        Ok(stats)
    }

    /// Removes all packs, and this machine's copy of them under `folder`; other machines' copies follow with their next run.
    ///
    /// # Errors
    /// The store's or the disk's.
    pub fn clear(&self, folder: &Path) -> Result<()> {
        let places: Result<Vec<Location>> = packs(&self.list()?).map(|object| self.at.child(&object.name)).collect();
        self.storage.delete_all(&places?)?;
        Cache::clear_as(&self.copy_folder(folder)?, Role::Copy { renew_before: 0 })
    }
}

/// The packs among what is there, the oldest first.
fn packs(listed: &[Listed]) -> impl DoubleEndedIterator<Item = &Listed> {
    listed.iter().filter(|object| PackName::is_ours(&object.name))
}

/// What a pack's results take; of one of another form, what it takes in the store.
fn n_unpacked(object: &Listed) -> u64 {
    PackName::parse(&object.name).map_or(object.n_bytes, |name| name.n_bytes)
}

fn millis(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Key;
    use crate::engine::Finished;
    use crate::outcome::FinishReason;

    const KIND: &str = "0123456789abcdef";

    fn finished(text: String) -> Finished {
        Finished { id: 5, tokens: vec![1], text, finish_reason: FinishReason::Stop, logprobs: Vec::new(), broken: None }
    }

    /// A text that does not get shorter.
    fn noise(i: u64) -> String {
        (0..4).map(|j: u64| blake3::hash(&(4 * i + j).to_le_bytes()).to_hex().to_string()).collect()
    }

    fn key(i: u64) -> Key {
        u128::from(i).to_be_bytes()
    }

    /// Folders of a store and of two machines' copies.
    struct Places(tempfile::TempDir);

    impl Places {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn packs(&self, max_bytes: u64) -> Packs {
            Packs::new(&format!("file://{}", self.0.path().join("store").display()), max_bytes).unwrap()
        }

        fn copy(&self, machine: &str) -> Cache {
            Cache::open_copy(&self.0.path().join(machine), 1 << 30, None).unwrap()
        }
    }

    impl Packs {
        /// A new machine's.
        fn copy_of(&self, places: &Places) -> Cache {
            let (copy, brought) = self.bring(&places.0.path().join("new"), KIND).unwrap();
            brought.unwrap();
            copy
        }
    }

    fn put(packs: &Packs, copy: &Cache, numbers: impl Iterator<Item = u64>) {
        let mut builder = PackBuilder::new(packs.max_bytes).unwrap();
        numbers.for_each(|i| builder.add(&key(i), &finished(noise(i))).unwrap());
        packs.keep(builder, KIND, copy).unwrap();
        // So that files' times tell which is older: their clock ticks slowly.
        std::thread::sleep(Duration::from_millis(30));
    }

    fn found(copy: &Cache, numbers: impl Iterator<Item = u64>) -> Vec<u64> {
        let wanted: Vec<(u64, Key)> = numbers.map(|i| (i, key(i))).collect();
        let found = copy.get(&wanted).unwrap().results;
        assert!(found.iter().all(|result| result.text == noise(result.id)));
        found.iter().map(|result| result.id).collect()
    }

    #[test]
    fn what_machines_put_all_find_and_what_is_gone_none() {
        let places = Places::new();
        let (packs, one, other) = (places.packs(1 << 20), places.copy("one"), places.copy("other"));
        packs.check().unwrap();
        assert_eq!(packs.bring_into(&one, KIND).unwrap().n_packs, 0);
        put(&packs, &one, 0..10);
        put(&packs, &other, 5..20);
        assert_eq!(found(&one, 0..20), (0..10).collect::<Vec<_>>(), "its own are there at once");
        for (copy, n_packs) in [(&one, 1), (&other, 1), (&one, 0)] {
            assert_eq!(packs.bring_into(copy, KIND).unwrap().n_packs, n_packs);
        }
        let all: Vec<u64> = (0..20).collect();
        assert_eq!((found(&one, 0..20), found(&other, 0..20)), (all.clone(), all));
        // Another model's are not fetched.
        assert_eq!(packs.bring_into(&places.copy("third"), "fedcba9876543210").unwrap().n_packs, 0);
        let stats = packs.stats().unwrap();
        assert_eq!((stats.n_packs, stats.n_results), (2, 25));
        // The older one goes; what is in both stays.
        let oldest = packs.list().unwrap()[0].name.clone();
        packs.storage.delete(&packs.at.child(&oldest).unwrap()).unwrap();
        packs.bring_into(&other, KIND).unwrap();
        assert_eq!(found(&other, 0..20), (5..20).collect::<Vec<_>>());
        packs.clear(places.0.path()).unwrap();
        assert_eq!(packs.stats().unwrap(), PackStats::default());
        packs.bring_into(&other, KIND).unwrap();
        assert_eq!(found(&other, 0..20), [0; 0]);
    }

    #[test]
    fn damage_is_named_and_foreign_objects_are_left_alone() {
        let places = Places::new();
        let (packs, one) = (places.packs(1 << 20), places.copy("one"));
        put(&packs, &one, 0..10);
        put(&packs, &one, 10..20);
        let damaged = packs.at.child(&packs.list().unwrap()[0].name).unwrap();
        let mut content = packs.storage.get(&damaged).unwrap().unwrap().to_vec();
        *content.last_mut().unwrap() ^= 1;
        packs.storage.put(&damaged, content.into()).unwrap();
        let empty = PackName::create(KIND, 3, 100);
        for name in ["a.txt", "b.txt", "c.txt", "d.txt", &empty] {
            packs.storage.put(&packs.at.child(name).unwrap(), Bytes::new()).unwrap();
        }
        let other = places.copy("other");
        let brought = packs.bring_into(&other, KIND).unwrap();
        assert_eq!(brought.n_packs, 1);
        assert_eq!(found(&other, 0..20), (10..20).collect::<Vec<_>>(), "something of a damaged pack was used");
        let said = brought.warnings.join("\n");
        assert_eq!(brought.warnings.len(), 3, "{said}");
        assert!(said.contains(&format!("{}: it is damaged", damaged.url)), "{said}");
        assert!(said.contains(&format!("{empty}: it is no pack of results")), "{said}");
        assert!(said.contains("a.txt, b.txt, c.txt and 1 more"), "{said}");
        packs.clear(places.0.path()).unwrap();
        assert_eq!(packs.storage.list(&packs.at).unwrap(), ["a.txt", "b.txt", "c.txt", "d.txt"]);
    }

    #[test]
    fn the_oldest_packs_make_room_and_the_copy_is_bounded_too() {
        let places = Places::new();
        let max_bytes = 400_000;
        let (packs, one) = (places.packs(max_bytes), places.copy("one"));
        for i in 0..60 {
            put(&packs, &one, i * 30..(i + 1) * 30);
            let stats = packs.stats().unwrap();
            assert!(stats.n_bytes <= max_bytes, "{stats:?} after {i}");
            let brought = packs.bring_into(&one, KIND).unwrap();
            assert_eq!(brought.renew_before.is_some(), stats.n_bytes > max_bytes / 2);
        }
        let kept = found(&one, 0..1800);
        assert!(kept.len() > 100 && kept == (1800 - kept.len() as u64..1800).collect::<Vec<_>>(), "{kept:?}");
        // About half of it is to be renewed before it goes: the older half.
        let listed = packs.list().unwrap();
        let before = packs.renew_before(&listed).unwrap();
        assert_eq!(packs.renew_before(&listed[listed.len() / 2 + 1..]), None);
        assert!(before > millis(listed[0].changed_at));
        assert_eq!(found(&packs.copy_of(&places), 0..1800), kept, "the copy has no room for what the store has");
        // A copy with room for less has the youngest.
        let small = Cache::open_copy(&places.0.path().join("small"), 150_000, None).unwrap();
        assert!(packs.bring_into(&small, KIND).unwrap().n_packs < listed.len() as u64);
        assert!(small.stats().unwrap().n_bytes <= 150_000);
        let there = found(&small, 0..1800);
        assert!(there.len() > 20 && there.contains(&1799) && there.len() < kept.len(), "{there:?}");
    }

    #[test]
    fn packs_of_few_results_are_bounded_in_number() {
        let places = Places::new();
        let (packs, one) = (places.packs(1 << 20), places.copy("one"));
        for i in 0..70 {
            put(&packs, &one, i..=i);
        }
        assert_eq!(packs.stats().unwrap().n_packs, MAX_SHARE);
        assert!(packs.bring_into(&one, KIND).unwrap().renew_before.is_some());
        assert_eq!(found(&one, 0..70), (6..70).collect::<Vec<_>>());
        assert_eq!((places.packs(1 << 40).counted(1), places.packs(1 << 40).counted(1 << 20)), (FLOOR_BYTES, 1 << 20));
    }

    #[test]
    fn a_copy_that_is_damaged_is_made_anew() {
        let places = Places::new();
        let (packs, folder) = (places.packs(1 << 20), places.0.path());
        let (copy, brought) = packs.bring(folder, KIND).unwrap();
        assert_eq!(brought.unwrap().n_packs, 0);
        put(&packs, &copy, 0..100);
        let path = copy.path().to_owned();
        drop(copy);
        let whole = std::fs::read(&path).unwrap();
        let mut inside = whole.clone();
        inside[4096..].fill(0x55);
        for damaged in [b"damaged ".repeat(1000), inside] {
            std::fs::write(&path, damaged).unwrap();
            let (copy, brought) = packs.bring(folder, KIND).unwrap();
            assert_eq!((brought.unwrap().n_packs, found(&copy, 0..100).len()), (1, 100));
        }
    }
}

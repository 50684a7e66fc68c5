//! What the server must remember: one `SQLite` database, written by one thread. Knows nothing of HTTP, models or what
//! the texts that it keeps say. Invariants: what a write gave back is on the disk; a write is done as a whole or not at
//! all; of one data folder there is one server.

pub mod answers;
pub mod batches;
pub mod files;
pub mod ledger;
pub mod one_off;
pub mod responses;
pub mod trajectories;
pub mod webhooks;

use anyhow::{Context, Result, anyhow, bail, ensure};
pub use rusqlite::Connection;
use rusqlite::TransactionBehavior::Immediate;
use rusqlite::{OpenFlags, Transaction};
use std::fs::{File, TryLockError};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::{oneshot, watch};

/// Statements that bring a database from each version to the next.
const MIGRATIONS: &[&str] = &[
    responses::TABLES,
    files::TABLES,
    batches::TABLES,
    webhooks::TABLES,
    ledger::TABLES,
    answers::TABLES,
    responses::FAULTS,
    ledger::HOURS,
    responses::TOLD,
    batches::TOKENS,
    files::REFERENCES,
    trajectories::TABLES,
    webhooks::BREAKER,
    one_off::TABLES,
    webhooks::WAITING,
];
/// The database, in its folder.
const FILE: &str = "valar.db";
/// Most writes that share one commit.
const GROUP: usize = 256;
/// How long a statement may wait for another process that looks at the database.
const BUSY: Duration = Duration::from_secs(10);

/// See the module.
pub struct Store {
    writer: Sender<Work>,
    reader: Sender<Work>,
    /// Of each thread's end.
    alive: [watch::Receiver<()>; 2],
    /// Held as long as the store is open.
    _lock: File,
}

/// Does something, unless there is a reason why that can't be, and gives what is to be told once it is committed, or why it was
/// not.
type Work = Box<dyn FnOnce(Result<&Connection, String>) -> Told + Send>;
type Told = Box<dyn FnOnce(Result<(), String>) + Send>;

impl Store {
    /// Opens the database of a data folder; makes it if it is not there.
    ///
    /// # Errors
    /// Another server uses the folder, the database is of a later version, or the disk fails.
    pub fn open(folder: &Path) -> Result<Self> {
        let shown = folder.display();
        let lock = File::options().create(true).truncate(false).write(true).open(folder.join("lock"));
        let lock = lock.with_context(|| format!("cannot use the data folder {shown}"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!("another server uses the data folder {shown}"),
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("cannot lock {shown}")),
        }
        let path = folder.join(FILE);
        let open = || -> Result<(Connection, Connection)> {
            let mut writer = Connection::open(&path)?;
            writer.busy_timeout(BUSY)?;
            writer.pragma_update(None, "journal_mode", "WAL")?;
            writer.pragma_update(None, "synchronous", "FULL")?;
            migrate(&mut writer)?;
            let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let reader = Connection::open_with_flags(&path, flags)?;
            reader.busy_timeout(BUSY)?;
            Ok((writer, reader))
        };
        let (writer, reader) = open().with_context(|| format!("{}", path.display()))?;
        let (writer, is_writing) = thread("store-write", writer, write_all)?;
        let (reader, is_reading) = thread("store-read", reader, read_all)?;
        Ok(Self { writer, reader, alive: [is_writing, is_reading], _lock: lock })
    }

    /// Writes; when this returns well, it is on the disk.
    ///
    /// # Errors
    /// The work's own, or the disk's: then nothing was written.
    pub async fn write<T: Send + 'static>(&self, work: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        let answer = send(&self.writer, |connection| in_savepoint(connection, work));
        answer.await.map_err(|_| ended())?
    }

    /// Returns when one of its threads has ended, which it does only by a fault.
    pub async fn ended(&self) {
        let [mut writer, mut reader] = self.alive.clone();
        // Nobody sends: an error means that the thread is gone.
        tokio::select! {
            _ = writer.changed() => {}
            _ = reader.changed() => {}
        }
    }

    /// Reads what was committed; whoever has written sees it.
    ///
    /// # Errors
    /// The work's own, or the disk's.
    pub async fn read<T: Send + 'static>(&self, work: impl FnOnce(&Connection) -> Result<T> + Send + 'static) -> Result<T> {
        send(&self.reader, work).await.map_err(|_| ended())?
    }
}

/// Reads the database of a data folder, whether a server uses it or not.
///
/// # Errors
/// There is none, it is of another version, or the work's own.
pub fn look<T>(folder: &Path, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    let path = folder.join(FILE);
    let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX);
    let connection = connection.with_context(|| path.display().to_string())?;
    connection.busy_timeout(BUSY)?;
    let version: usize = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    ensure!(version == MIGRATIONS.len(), "{}: version {version}, this program's is {}", path.display(), MIGRATIONS.len());
    work(&connection)
}

/// The database can't be used just now.
#[derive(Debug, thiserror::Error)]
#[error("cannot {0} the database: {1}")]
struct Unusable(&'static str, String);

/// Whether an error is of a kind that may pass, and leaves nothing behind: the database is locked, the disk full or faulty.
pub fn may_pass(error: &anyhow::Error) -> bool {
    let of_database = |error: &rusqlite::Error| {
        let code = error.sqlite_error_code();
        code.is_some_and(|code| {
            use rusqlite::ErrorCode::{CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, SystemIoFailure};
            [CannotOpen, DatabaseBusy, DatabaseLocked, DiskFull, OutOfMemory, SystemIoFailure].contains(&code)
        })
    };
    let of_disk = |error: &std::io::Error| matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded);
    let may = |cause: &(dyn std::error::Error + 'static)| {
        cause.is::<Unusable>() || cause.downcast_ref().is_some_and(of_database) || cause.downcast_ref().is_some_and(of_disk)
    };
    error.is::<Unusable>() || error.downcast_ref().is_some_and(of_database) || error.chain().any(may)
}

fn ended() -> anyhow::Error {
    anyhow!("the database's thread has ended")
}

fn send<T: Send + 'static>(
    thread: &Sender<Work>,
    work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
) -> oneshot::Receiver<Result<T>> {
    let (reply, answer) = oneshot::channel();
    let work = move |connection: Result<&Connection, String>| -> Told {
        let done = connection.map_err(|why| Unusable("use", why).into()).and_then(work);
        Box::new(move |committed| {
            let result = committed.map_err(|why| anyhow::Error::new(Unusable("write to", why))).and(done);
            // Whoever asked may be gone; what was done is done.
            drop(reply.send(result));
        })
    };
    // A thread that has ended drops the work, and the answer says so.
    drop(thread.send(Box::new(work)));
    answer
}

fn thread(
    name: &str,
    mut connection: Connection,
    run: impl FnOnce(&mut Connection, &Receiver<Work>) + Send + 'static,
) -> Result<(Sender<Work>, watch::Receiver<()>)> {
    let (sender, work) = channel();
    let (alive, is_alive) = watch::channel(());
    let thread = std::thread::Builder::new().name(name.into());
    let run = move || {
        let _alive = alive;
        run(&mut connection, &work);
    };
    thread.spawn(run).context("cannot start the database's thread")?;
    Ok((sender, is_alive))
}

/// Commits what waits together: each commit waits for the disk.
fn write_all(connection: &mut Connection, work: &Receiver<Work>) {
    while let Ok(first) = work.recv() {
        let (mut told, mut next) = (Vec::new(), Some(first));
        let mut group = || -> rusqlite::Result<()> {
            let transaction = Transaction::new(connection, Immediate)?;
            let inside: &Connection = &transaction;
            while let Some(work_of_group) = next.take() {
                told.push(work_of_group(Ok(inside)));
                // A fault of the disk ends the transaction by itself: what came after would be one of its own.
                if told.len() < GROUP && !inside.is_autocommit() {
                    next = work.try_recv().ok();
                }
            }
            transaction.commit()
        };
        let committed = group().map_err(|error| error.to_string());
        // The group could not begin.
        if let (Some(refused), Err(why)) = (next, &committed) {
            told.push(refused(Err(why.clone())));
        }
        for tell in told {
            tell(committed.clone());
        }
    }
}

fn read_all(connection: &mut Connection, work: &Receiver<Work>) {
    for work in work {
        // One moment of the database for all statements of a read.
        match connection.unchecked_transaction() {
            Ok(transaction) => {
                let inside: &Connection = &transaction;
                work(Ok(inside))(Ok(()));
            }
            Err(error) => work(Err(error.to_string()))(Ok(())),
        }
    }
}

/// What fails leaves nothing behind in the group's transaction.
fn in_savepoint<T>(connection: &Connection, work: impl FnOnce(&Connection) -> Result<T>) -> Result<T> {
    connection.execute_batch("SAVEPOINT work")?;
    let done = work(connection);
    let ended = connection.execute_batch(if done.is_ok() { "RELEASE work" } else { "ROLLBACK TO work; RELEASE work" });
    // Why the work failed says more than that the savepoint is gone with the transaction.
    let value = done?;
    ended?;
    Ok(value)
}

fn migrate(connection: &mut Connection) -> Result<()> {
    let transaction = Transaction::new(connection, Immediate)?;
    let version: usize = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
    ensure!(version <= MIGRATIONS.len(), "version {version} is later than this program's, {}", MIGRATIONS.len());
    for next in &MIGRATIONS[version..] {
        transaction.execute_batch(next)?;
    }
    transaction.pragma_update(None, "user_version", MIGRATIONS.len())?;
    transaction.commit()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(connection: &Connection) -> Result<u64> {
        Ok(connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0))?)
    }

    #[tokio::test]
    async fn a_write_is_done_whole_or_not_at_all_and_lasts() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert!(Store::open(folder.path()).is_err(), "two servers");
        store.write(|c| Ok(c.execute_batch("CREATE TABLE t (x)")?)).await.unwrap();
        // Side by side, so that they share commits; every third fails after it has written.
        let writes = (0..300).map(|i| {
            store.write(move |c| {
                c.execute("INSERT INTO t VALUES (?1)", [i])?;
                ensure!(i % 3 != 0, "refused");
                Ok(())
            })
        });
        let done = futures::future::join_all(writes).await;
        assert_eq!(done.iter().filter(|done| done.is_err()).count(), 100);
        assert_eq!(store.read(count).await.unwrap(), 200);
        drop(store);
        let mut again = Err(anyhow!(""));
        // The threads of the first one end in their own time.
        while again.is_err() {
            again = Store::open(folder.path());
        }
        assert_eq!(again.unwrap().read(count).await.unwrap(), 200);
    }

    #[tokio::test]
    async fn what_is_told_is_true_when_a_transaction_ends_by_itself() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        store.write(|c| Ok(c.execute_batch("CREATE TABLE t (x)")?)).await.unwrap();
        // As after some faults of the disk: the whole transaction is rolled back within a statement.
        let writes = (0..300).map(|i| {
            store.write(move |c| {
                c.execute("INSERT INTO t VALUES (?1)", [i])?;
                if i % 50 == 7 {
                    c.execute_batch("ROLLBACK")?;
                    bail!("the disk is full");
                }
                Ok(())
            })
        });
        let done = futures::future::join_all(writes).await;
        let told: Vec<usize> = (0..300).filter(|&i| done[i].is_ok()).collect();
        let read = |c: &Connection| -> Result<Vec<usize>> {
            let mut statement = c.prepare("SELECT x FROM t ORDER BY x")?;
            let rows = statement.query_map([], |row| row.get(0))?;
            Ok(rows.collect::<rusqlite::Result<_>>()?)
        };
        assert_eq!(store.read(read).await.unwrap(), told);
        assert!(!told.contains(&7) && told.len() < 300);
    }

    #[test]
    fn a_later_version_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        drop(Store::open(folder.path()).unwrap());
        let connection = Connection::open(folder.path().join("valar.db")).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();
        let error = format!("{:#}", Store::open(folder.path()).err().unwrap());
        assert!(error.contains("version 999"), "{error}");
    }
}

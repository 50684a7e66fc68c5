//! Leaves the other devices out of `device`, and what they need.

fn main() {
    println!("cargo::rustc-check-cfg=cfg(cpu_alone)");
    println!("cargo::rustc-cfg=cpu_alone");
}

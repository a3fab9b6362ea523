//! Reads a dump of guest RAM: `dump NAME.ram NAME.regs [SYMBOL…]` prints what introspection finds in it.
//!
//! The RAM file is guest-physical memory from 0 on. The registers are one line a vCPU, `cpu=0 rax=0x… rip=0x… cr3=0x…`.

use std::error::Error;
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use introspect::{Gva, Kernel, PhysMemory, Unbacked, VcpuRegs, modules};
use vm_memory::GuestAddress;

struct Ram(fs::File);

impl PhysMemory for Ram {
    fn read(&self, gpa: GuestAddress, buf: &mut [u8]) -> Result<(), Unbacked> {
        self.0.read_exact_at(buf, gpa.0).map_err(|_| Unbacked {
            gpa,
            len: buf.len(),
        })
    }
}

fn registers(line: &str) -> Result<VcpuRegs, Box<dyn Error>> {
    let mut regs = VcpuRegs {
        online: true,
        ..VcpuRegs::default()
    };
    for (name, value) in line
        .split_whitespace()
        .filter_map(|word| word.split_once('='))
    {
        let value = match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16)?,
            None => value.parse()?,
        };
        let slot = match name {
            "cpu" => {
                regs.index = value.try_into()?;
                continue;
            }
            "cpl" => {
                regs.cpl = value.try_into()?;
                continue;
            }
            "idt_limit" => {
                regs.idt_limit = value.try_into()?;
                continue;
            }
            "rip" => &mut regs.rip,
            "rsp" => &mut regs.rsp,
            "cr0" => &mut regs.cr0,
            "cr3" => &mut regs.cr3,
            "cr4" => &mut regs.cr4,
            "efer" => &mut regs.efer,
            "gs_base" => &mut regs.gs_base,
            "kernel_gs_base" => &mut regs.kernel_gs_base,
            "lstar" => &mut regs.lstar,
            "idt_base" => &mut regs.idt_base,
            _ => continue,
        };
        *slot = value;
    }
    Ok(regs)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(ram), Some(regs)) = (args.next(), args.next()) else {
        return Err("usage: dump NAME.ram NAME.regs [SYMBOL…]".into());
    };
    let ram = Ram(fs::File::open(ram)?);
    let vcpus = fs::read_to_string(regs)?
        .lines()
        .map(registers)
        .collect::<Result<Vec<_>, _>>()?;
    let began = Instant::now();
    let kernel = Kernel::find(&ram, &vcpus)?;
    let took = began.elapsed();
    println!("{}", kernel.banner);
    println!("release   {}", kernel.release);
    println!("found in  {took:?}");
    println!(
        "base      {} at physical {:#x}, phys_base {:#x}",
        kernel.base, kernel.phys.0, kernel.phys_base
    );
    println!("symbols   {}", kernel.symbols.len());
    println!("types     {}", kernel.btf.len());
    println!("livepatch {:?}", kernel.livepatch);
    println!("tif       {:?}", kernel.tif);
    let memory = kernel.memory(&ram);
    let args: Vec<String> = args.collect();
    let all = args.iter().any(|arg| arg == "--symbols");
    println!(
        "cpus      {:?}, online {:?}",
        kernel.percpu.cpus(),
        kernel.percpu.online(&memory)?
    );
    for vcpu in &vcpus {
        let place = match kernel.symbolize(Gva(vcpu.rip)) {
            Some((symbol, offset)) => format!("{}+{offset:#x}", symbol.name),
            None => Gva(vcpu.rip).to_string(),
        };
        println!("vcpu {}    cpl {} in {place}", vcpu.index, vcpu.cpl);
    }
    for module in modules::modules(&kernel, &memory)? {
        println!("module    {} {:?}", module.name, module.text);
        let symbols = module.symbols(&kernel, &memory)?;
        for symbol in symbols.iter().filter(|_| all) {
            let at = symbols.at(symbol.gva).map_or("?", |(found, _)| found.name);
            println!(
                "{:016x} {} [{}] {at}",
                symbol.gva.0, symbol.name, module.name
            );
        }
    }
    for name in args {
        if name == "--symbols" {
            for symbol in kernel.symbols.iter() {
                println!("{:016x} {} {}", symbol.gva.0, symbol.letter, symbol.name);
            }
        } else if name.contains('.') {
            println!("{name}: {:?}", kernel.btf.member(&name));
        } else {
            let mut code = [0; 128];
            let gva = kernel.symbols.address(&name)?;
            memory.read(gva, &mut code)?;
            println!("{name} {gva} {:?} {code:02x?}", kernel.symbols.size(gva));
        }
    }
    Ok(())
}

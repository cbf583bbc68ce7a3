output "addresses" {
  description = "Public addresses."
  value       = { for name, ip in aws_eip.public : name => ip.public_ip }
}

output "inventory" {
  description = "Private address and role of each machine: what deploy/ansible/inventory.example.yml asks for."
  value = merge(
    { for name, role in module.plan.nodes : name => { role = role, address = aws_instance.node[name].private_ip } },
    { for name, machine in aws_instance.serving : name => { role = "gpu", address = machine.private_ip } },
  )
}

output "data_device" {
  description = "The disk for films on the machine with the role data: share_device of deploy/ansible."
  value       = "/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_${replace(aws_ebs_volume.data.id, "-", "")}"
}

output "capacity" {
  description = "What the environment asks for, and what the machines offer it."
  value       = module.plan.capacity
}

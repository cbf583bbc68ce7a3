output "addresses" {
  description = "Public addresses."
  value       = { for name, ip in aws_eip.public : name => ip.public_ip }
}

output "inventory" {
  description = "Private address and role of each machine: what deploy/ansible/inventory.example.yml asks for."
  value       = { for name, role in module.plan.nodes : name => { role = role, address = aws_instance.node[name].private_ip } }
}
